"""States of layers against forwards without cache: trees, rows that are done, refilled rows; faults that must show."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec.recurrent import parts
from paceline.spec.recurrent.passes import TextPass
from paceline.spec.recurrent.states import States
from paceline.spec.target.selftest import TOLERANCE, self_test
from paceline.spec.tree import TokenTree, TreeShape

from support.families import KINDS, STATEFUL, build
from support.reference import CheckedRows

pytestmark = pytest.mark.usefixtures("one_thread")
TREE = TokenTree.of(TreeShape((-1, 0, 0, 1, 1, 2, 4)), "cpu")
CLOSE = 1e-5


@pytest.mark.parametrize("tree", [TREE, TokenTree.of(TreeShape.chain(3), "cpu")], ids=["tree", "chain"])
def test_steps_with_rows_that_are_done(stateful, tree):
    """Rows of three lengths, one of them with nothing to read; every forward runs twice."""
    rows = CheckedRows(stateful, (9, 1, 6))
    for nodes in ((3, None, 1), (None, 2, 0), (1, 3, None), (0, 0, 0)):
        assert rows.step(tree, nodes, again=True) < CLOSE


def test_a_refilled_row_begins_anew_and_a_moved_one_goes_on(stateful):
    rows = CheckedRows(stateful, (9, 5, 4))
    rows.step(TREE, (4, 2, 6), check=False)
    index = torch.tensor([2, 0])
    rows.texts[2], rows.texts[0] = rows.tokens(7).tolist(), rows.tokens(2).tolist()
    rows.slots.clear(index)
    rows.read(3, index)
    assert rows.step(TREE, (1, 6, 3)) < CLOSE
    fewer = CheckedRows(stateful, (1, 1))
    fewer.slots.copy_rows(rows.slots, torch.tensor([2, 1]))
    fewer.texts = [rows.texts[2], rows.texts[1]]
    assert fewer.step(TREE, (1, 6)) < CLOSE and fewer.step(TREE, (0, 0)) < CLOSE


def test_a_row_that_is_taken_by_a_text_without_states_forgets_what_it_had(stateful):
    rows, empty = CheckedRows(stateful, (9, 5)), CheckedRows(stateful, (1,))
    rows.slots.copy_rows(empty.slots, torch.tensor([0]), torch.tensor([1]))
    rows.texts[1] = empty.texts[0]
    assert rows.step(TREE, (4, 2)) < CLOSE


@torch.no_grad()
def test_what_is_held_does_not_depend_on_chunks_and_padding(stateful):
    states = [
        [part.state for part in CheckedRows(stateful, lengths, chunk).slots.cache.states.parts]
        for lengths, chunk in (((9, 9), 64), ((9, 3), 2))
    ]
    for whole, chunked in zip(*states):
        torch.testing.assert_close(whole[0], chunked[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_mamba_1_reads_no_more_at_once_than_has_room(monkeypatch):
    """The states of all tokens of a chunk would be as large as the prompt; pieces leave the same state."""
    model = build("mamba", STATEFUL["mamba"])
    whole = CheckedRows(model, (24, 9), 64)
    states = 4 * 2 * whole.slots.cache.states.parts[1].state[0].numel()  # of a token in both rows
    monkeypatch.setattr(parts, "PIECE", 5 * states)
    widths, stock = [], parts.ScanMemory._read

    def read(part, scan, memory, inputs, *others):
        widths.append(inputs.shape[2])
        return stock(part, scan, memory, inputs, *others)

    monkeypatch.setattr(parts.ScanMemory, "_read", read)
    pieces = CheckedRows(model, (24, 9), 64)
    assert widths == [5, 5, 5, 5, 3] * 2
    for one, other in zip(whole.slots.cache.states.parts, pieces.slots.cache.states.parts):
        torch.testing.assert_close(one.state, other.state, rtol=1e-5, atol=1e-6)
    assert pieces.step(TREE, (4, 2)) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_in_bfloat16_it_is_as_near_to_a_plain_forward_as_that_is_to_float32(name):
    exact = build(name, STATEFUL[name] | dict(hidden_size=64, num_heads=16))
    model, errors = copy.deepcopy(exact).bfloat16(), []
    for seed in range(3):
        rows = CheckedRows(model, (30,), 8, seed=seed)
        nodes = torch.tensor([[rows.texts[0][-1], *rows.tokens(5).tolist()]])
        ours = rows.slots.forward_nodes(nodes, rows.base, TokenTree.of(TreeShape.chain(5), "cpu")).logits[0]
        ids = torch.tensor([rows.texts[0] + nodes[0, 1:].tolist()])
        plain, truth = (each(input_ids=ids, use_cache=False).logits[0, -6:].float() for each in (model, exact))
        errors.append([(one - other).square().mean().sqrt() for one, other in ((ours, plain), (plain, truth))])
    apart, rounding = torch.tensor(errors).mean(0).tolist()
    assert apart < 1.5 * rounding and rounding < 0.1 * float(truth.std())  # both are roundings


def test_states_are_of_constant_size(stateful):
    """What a row keeps does not grow with its text, but for slots of attention."""
    sizes = [sum(part.state.nbytes for part in CheckedRows(stateful, (n,)).slots.cache.states.parts) for n in (2, 30)]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data())
def test_any_trees_chunks_and_ends(data):
    """Two random trees, with ends anywhere; what they leave is compared by the logits behind it, to save time."""
    model = _built(data.draw(st.sampled_from([*KINDS.values()])))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    rows = CheckedRows(model, lengths, data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 99)))
    for _ in range(2):
        size = data.draw(st.integers(1, 6))
        parents = [-1, *(data.draw(st.integers(0, node - 1)) for node in range(1, size))]
        tree = TokenTree.of(TreeShape(tuple(parents)), "cpu")
        node = st.one_of(st.none(), st.integers(0, size - 1))
        rows.step(tree, [data.draw(node) for _ in lengths], again=data.draw(st.booleans()), check=False)
    last = TokenTree.of(TreeShape.chain(1), "cpu")
    assert rows.step(last, [None] * len(lengths)) < 10 * CLOSE  # the worst of hundreds; a fault costs far more


_models = {}


def _built(name):
    if name not in _models:
        _models[name] = build(name, STATEFUL[name])
    return _models[name]


def _rejected(patch):
    """A commit that absorbs one node too many."""
    stock = States.commit
    patch.setattr(States, "commit", lambda states, base, path, count: stock(states, base, path, count + (count > 0)))


def _done(patch):
    stock = States.commit
    patch.setattr(States, "commit", lambda states, base, path, count: stock(states, base, path, count.clamp(min=1)))


def _beside(patch):
    """Only while another row commits."""
    stock = States.commit

    def commit(states, base, path, count):
        stock(states, base, path, torch.where((count > 0).any(), count.clamp(min=1), count))

    patch.setattr(States, "commit", commit)


def _padding(patch):
    stock = TextPass.__init__
    patch.setattr(TextPass, "__init__", lambda at, rows, inside: stock(at, rows, torch.ones_like(inside)))


def _twice(patch):
    """A forward that absorbs its root."""
    stock = States.nodes

    def nodes(states, base, tree, index):
        states.forwarded[:] = True
        at = stock(states, base, tree, index)
        if all(part.kept for part in states.parts):
            states.commit(base, base[:, None] * 0, base * 0 + 1)
        return at

    patch.setattr(States, "nodes", nodes)


@pytest.mark.parametrize("fault", [_rejected, _done, _beside, _padding, _twice])
def test_the_self_test_finds_states_that_go_wrong(stateful, fault, monkeypatch):
    assert self_test(stateful) < TOLERANCE[torch.float32]
    fault(monkeypatch)
    assert self_test(stateful) > 100 * TOLERANCE[torch.float32]
