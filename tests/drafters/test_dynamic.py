"""Trees grown best-first on the device: the reference's tree, the target's text, and no orphans."""

import paceline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.dynamic_tree import DynamicTree, best_tokens
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.spec.engines import runs
from paceline.spec.proposal import DraftRequest, DraftSampling
from paceline.spec.state import DecodeState
from paceline.spec.tree import DynamicShape, TreeShape
from torch import Tensor

from support.models import eagle_copy, noisy_copy, tiny_llama
from support.tape import tape_executor


@torch.no_grad()
def grown(model, text, shape, temperature=1.0):
    """The paths (tuples of tokens) of the best-first tree, by cache-less forwards of every path."""
    pool = {(): 0.0}
    for depth in range(shape.max_depth):
        for path in [path for path in pool if len(path) == depth][: shape.width]:
            logits = model(input_ids=torch.tensor([[*text, *path]]), use_cache=False).logits[0, -1].float()
            best = (logits / temperature).log_softmax(-1).topk(shape.width)
            pool |= {(*path, token): pool[path] + value for value, token in zip(*map(Tensor.tolist, best))}
        pool = dict(sorted(pool.items(), key=lambda item: -item[1])[: shape.nodes])
    return pool.keys() - {()}


def paths_of(event):
    paths = {0: ()}
    for node, parent in enumerate(event.parents[1:], 1):
        assert 0 <= parent < node, "an orphan"
        paths[node] = (*paths[parent], event.tokens[node])
    return set(paths.values()) - {()}


@pytest.mark.parametrize("spec", ["dynamic:12x4x3", "dynamic:2x1x1", "dynamic:9x2x4", "dynamic:5x4x1"])
@pytest.mark.parametrize("way", [dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=0)])
def test_trees_and_text(target, draft, ragged, spec, way):
    ids, mask = ragged
    options = dict(max_new_tokens=16, seed=3, return_dict_in_generate=True, **way)
    truth = paceline.generate(target, ids, mask, **options).sequences
    out = paceline.generate(target, ids, mask, drafter=draft, tree=spec, **options)
    assert torch.equal(out.sequences, truth)
    shape = TreeShape.parse(spec)
    for row in (0, 2):
        text = ids[row][mask[row] == 1].tolist()
        for event in [event for event in out.trace.events if event.row == row]:
            assert paths_of(event) == grown(draft.model, text, shape, way.get("temperature", 1.0))
            text += event.committed
    assert len({tuple(event.parents) for event in out.trace.events}) > 1 or spec in ("dynamic:2x1x1", "dynamic:5x4x1")


@pytest.mark.parametrize("spec", ["dynamic:512x16x32", "dynamic:256x32x12", "dynamic:128x4x24"])
def test_very_large_trees(target, draft, spec):
    shape, prompt = TreeShape.parse(spec), torch.arange(5, 17)[None]
    options = dict(do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    truth = paceline.generate(target, prompt, **options).sequences
    out = paceline.generate(target, prompt, drafter=draft, tree=spec, **options)
    eagle = paceline.generate(target, prompt, drafter=EagleDrafter(eagle_copy(target)), tree=spec, **options)
    assert torch.equal(out.sequences, truth) and torch.equal(eagle.sequences, truth)
    event = out.trace.events[0]
    assert len(paths_of(event)) == shape.nodes - 1 == len(paths_of(eagle.trace.events[0]))
    assert paths_of(event) == grown(draft.model, prompt[0].tolist(), shape)


def proposal_of(logits_of, shape, may_wait=False, rows=2):
    """What is grown from `logits_of` (V, V), by the token before, and how many nodes each forward had."""
    vocab, forwards = len(logits_of), []

    class Table:
        def root_logits(self, state, base):
            return logits_of[state.tokens.gather(1, base[:, None])]

        def node_logits(self, tokens, base, tree, nodes):
            forwards.append(len(nodes))
            above = tree.parents[:, nodes]
            assert (above < nodes).all() and torch.equal(tree.depths[:, nodes], tree.depths.gather(1, above) + 1)
            seen = tree.ancestors[:, nodes].sum(-1)
            assert torch.equal(seen, tree.depths[:, nodes] + 1), "itself and its ancestors"
            return logits_of[tokens]

    cpu = torch.device("cpu")
    request = DraftRequest(rows, 64, vocab, cpu, shape, DraftSampling(), may_wait=may_wait)
    state = DecodeState.empty(rows, 64, 1, cpu)
    state.tokens[:, 0], state.done[:] = torch.arange(rows), False
    return DynamicTree(request).grow(state, Table()), forwards


def chains(proposal, row=0, nodes=None):
    """The tokens on the way to each node of a row, in the order of the nodes."""
    tree, paths = proposal.tree, []
    for node in range(1, nodes or tree.size):
        steps = tree.paths[row, node, 1 : tree.depths[row, node] + 1]
        paths.append(tuple(proposal.tokens[row, steps].tolist()))
    return paths


@given(st.integers(0, 10_000), st.sampled_from(["dynamic:30x6x4", "dynamic:9x5x3", "dynamic:4x6x4", "dynamic:24x4x5"]))
@settings(max_examples=30)
def test_a_smaller_tree_is_the_beginning_of_a_larger_one(seed, spec):
    """So that a trace of one shows what all smaller ones would have drafted. And growth that may ask the host forwards
    fewer nodes, for the same tree."""
    torch.manual_seed(seed)
    shape, logits = TreeShape.parse(spec), 3 * torch.randn(17, 17)
    large, forwards = proposal_of(logits, shape)
    early, fewer = proposal_of(logits, shape, may_wait=True)
    assert torch.equal(early.tokens, large.tokens) and torch.equal(early.tree.parents, large.tree.parents)
    assert forwards == [shape.batch] * (shape.max_depth - 1)
    assert len(fewer) <= len(forwards) and all(0 < count <= shape.batch for count in fewer)
    for nodes in {2, len(shape) // 2, len(shape) - 1}:
        small, _ = proposal_of(logits, DynamicShape(nodes, shape.max_depth, shape.width))
        assert chains(small, 1) == chains(large, 1, nodes)
    whole = chains(large)
    for depth in range(2, shape.max_depth):
        if 1 + shape.width + shape.width**2 * (depth - 1) >= len(shape):
            small, _ = proposal_of(logits, DynamicShape(len(shape), depth, shape.width))
            assert [path for path in whole if len(path) <= depth] == chains(small)[
                : sum(len(p) <= depth for p in whole)
            ]


def test_growth_ends_early_where_the_draft_is_sure():
    logits = torch.eye(9).roll(1, dims=1) * 30  # one token follows each, nearly for certain
    _, forwards = proposal_of(logits, TreeShape.parse("dynamic:4x8x3"), may_wait=True)
    assert forwards == [3, 1, 1], "of three nodes two make way for a chain, whose children are no better"


@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.nan, -1e9])
def test_no_logits_can_orphan_a_child(value):
    """Of tokens that are all alike, impossible, no numbers, or so unlikely that no edge changes a path's score."""
    for logits in (torch.full((17, 17), value), torch.full((17, 17), value).fill_diagonal_(0)):
        proposal, _ = proposal_of(logits, TreeShape.parse("dynamic:40x5x4"))
        for row in range(2):
            parents = proposal.tree.parents[row].tolist()
            assert parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents[1:], 1))
            assert len(set(chains(proposal, row))) == 39, "all different"


@given(st.integers(0, 10_000), st.integers(1, 400), st.integers(1, 40))
@settings(max_examples=60)
def test_best_tokens(seed, vocab, count):
    torch.manual_seed(seed)
    scores = torch.randint(0, 30, (2, 3, vocab)).float()  # with many ties
    values, tokens = best_tokens(scores, min(count, vocab))
    assert torch.equal(values, scores.topk(min(count, vocab)).values)
    assert torch.equal(values, scores.gather(-1, tokens)) and (tokens.sort(-1).values.diff(dim=-1) > 0).all()


def test_ties_cannot_orphan_a_child(target, ragged):
    """A draft that finds all tokens equally likely, and one that is certain (log q = 0 along a path)."""
    flat, certain = tiny_llama(tie_word_embeddings=False), tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        certain.model.norm.weight.mul_(1e4)
    for model in (flat, certain):
        out = paceline.generate(
            target, *ragged, drafter=ModelDrafter(model), tree="dynamic:14x5x3", do_sample=False, max_new_tokens=12,
            return_dict_in_generate=True,
        )  # fmt: skip
        for event in out.trace.events:
            assert len(paths_of(event)) == 13, "all different, all with their parents"
        assert torch.equal(out.sequences, paceline.generate(target, *ragged, do_sample=False, max_new_tokens=12))


def test_forwards_beyond_the_tree_have_slots(target):
    """Level by level the draft forwards 21 nodes to choose 4, up to the last slots of its cache."""
    drafter, prompt = ModelDrafter(noisy_copy(target)), torch.arange(5, 13)[None]
    options = dict(do_sample=False, max_new_tokens=64 - 8 - 4 - 1)
    plain = paceline.generate(target, prompt, **options)
    assert torch.equal(paceline.generate(target, prompt, drafter=drafter, tree="dynamic:4x6x4", **options), plain)


def test_dynamic_trees_are_captured(ragged, monkeypatch):
    """One recording grows other trees on other prompts."""
    model = tiny_llama(seed=2)
    drafter = ModelDrafter(noisy_copy(model))
    ids, mask = ragged
    with tape_executor(monkeypatch) as tapes:
        for seed, batch in enumerate([(ids, mask), (ids.flip(0), mask.flip(0)), (ids, mask)]):
            options = dict(drafter=drafter, tree="dynamic:10x4x3", max_new_tokens=20, seed=seed, do_sample=True)
            truth = paceline.generate(model, *batch, executor="eager", **options)
            assert torch.equal(paceline.generate(model, *batch, executor="tape", **options), truth)
    assert len(tapes) == 1 and tapes[0].tape.offences == [] and tapes[0].replays > 5
    runs.reset(model)


@pytest.mark.slow
def test_a_dynamic_step_is_one_graph(ragged):
    from paceline.spec.plan.step_times import open_idle
    from paceline.spec.step import step
    from torch._dynamo.testing import CompileCounter

    model = tiny_llama(seed=2)
    runner = open_idle(model, "eager", ModelDrafter(noisy_copy(model)), TreeShape.parse("dynamic:10x4x3"), 128)
    counter = CompileCounter()
    runner.engine.idle_step()
    traced = torch.compile(lambda: step(runner.engine, lambda phase: None), backend=counter, fullgraph=True)
    with torch.no_grad():
        traced(), traced()
    assert counter.frame_count == 1


def test_a_dynamic_tree_beats_a_static_one_of_its_size(target, draft):
    torch.manual_seed(1)
    prompts = torch.randint(1, 61, (12, 8))
    steps = {}
    for tree in ("dynamic:13x4x4", "3x3"):
        out = paceline.generate(
            target, prompts, drafter=draft, tree=tree, do_sample=False, max_new_tokens=40, return_dict_in_generate=True
        )
        steps[tree] = out.trace.summary()["tokens_per_step"]
    assert steps["dynamic:13x4x4"] > steps["3x3"]


@pytest.mark.parametrize("spec", ["dynamic:99x2x3", "dynamic:1x2x3", "dynamic:4x0x3", "dynamic:4x2", "dynamic:axbxc"])
def test_malformed_sizes_are_refused(spec):
    with pytest.raises(ValueError, match=r"dynamic:.*nodes, depth, width") as caught:
        TreeShape.parse(spec)
    assert "\n" not in str(caught.value)
    assert DynamicShape(13, 2, 3).max_children == 3


def test_other_drafters_and_rules_refuse(target, draft, ragged):
    with pytest.raises(ValueError, match="fixed trees only"):
        paceline.generate(target, *ragged, drafter="ngram", tree="dynamic:8x3x3", max_new_tokens=4)
    with pytest.raises(ValueError, match="without drawing"):
        paceline.generate(
            target, *ragged, drafter=draft, tree="dynamic:8x3x3", verify="residual", do_sample=True, max_new_tokens=4
        )
