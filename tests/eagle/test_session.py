"""What sessions hold after steps is what reading the same text anew gives, whatever was accepted."""

import paceline
import pytest
import torch
from eagle.by_hand import opened, step_by_chance, texts_of
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.eagle.session import EagleSession
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.plan.step_times import slot_bytes

from support.models import noisy_copy, random_eagle, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
TREES = ["chain:4", "3x2x1", "dynamic:10x4x3"]
BOTH = ["2x2x1+chain:1", "2x1+chain:5"]  # with either drafter's part the deeper one


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def drafters(model):
    settings = dict(wide=True, taps=(0, 1, "head"), tap_norms=True, norm_output=True, known=torch.arange(3, 50))
    made = {"eagle": EagleDrafter(random_eagle(model, **settings)), "draft": ModelDrafter(noisy_copy(model))}
    return made | {f"{name}+ngram": Beside(drafter, NgramDrafter()) for name, drafter in made.items()}


def stepped(model, drafter, tree, session=lambda session: None):
    """An engine after steps by chance, in which the second row ends early."""
    engine, generator, accepted = opened(model, drafter, tree), torch.Generator().manual_seed(1), set()
    session(engine.session)
    for number in range(8):
        if number == 4:
            engine.state.done[1] = True
        accepted |= {*step_by_chance(engine, generator).tolist()}
    assert 0 in accepted and max(accepted) >= 3, "short paths and deep ones"
    return engine


@torch.no_grad()
def difference(model, drafter, tree, engine):
    """How far what the drafter's session holds at the beginning of a step is from that of a session which has read the
    texts of `engine` at once."""
    anew, largest = opened(model, drafter, tree, texts_of(engine), chunk=64), 0.0
    for each in (engine, anew):
        each.session.propose(each.state)
    held, read = (getattr(each.session, "sessions", [each.session])[0] for each in (engine, anew))
    for row, text in enumerate(texts_of(engine)):
        if isinstance(held, EagleSession):
            pairs = len(text) - 1
            largest = max(largest, float((held.features - read.features)[row, :pairs].abs().max()))
        else:
            pairs = len(text)
        for mine, other in zip(held.slots.cache.layers, read.slots.cache.layers):
            for one, two in zip(mine.buffers, other.buffers):
                largest = max(largest, float((mine.by_row(one) - other.by_row(two))[row, :pairs].abs().max()))
    return largest


@pytest.mark.parametrize(
    ("name", "tree"),
    [(name, tree) for name in ("eagle", "draft") for tree in TREES]
    + [(f"{name}+ngram", tree) for name in ("eagle", "draft") for tree in BOTH],
)
def test_after_commits_it_holds_what_reading_anew_gives(model, drafters, name, tree):
    assert difference(model, drafters[name], tree, stepped(model, drafters[name], tree)) < 1e-4


def no_overwriting(session):
    """Only the pair of the root is read again, so that pairs with guessed features stay."""
    session.depth = 0


def shifted_features(session):
    """Each true feature is kept one position too far."""
    follow = session.follow
    session.follow = lambda base, *others: follow(base + 1, *others)


def own_numbers(session):
    """The numbers of the whole tree are taken for those of the draft model's part."""
    session.sessions[0].numbers = torch.arange(len(session.sessions[0].numbers))


def no_reading_again(session):
    """What the other drafter proposed is not read."""
    session.sessions[0].unread = 2


@pytest.mark.parametrize(
    ("name", "tree", "fault"),
    [
        ("eagle", "3x2x1", no_overwriting), ("eagle", "dynamic:10x4x3", no_overwriting),
        ("eagle", "chain:4", shifted_features), ("eagle+ngram", BOTH[1], lambda both: no_overwriting(both.sessions[0])),
        ("draft+ngram", BOTH[0], own_numbers), ("draft+ngram", BOTH[1], no_reading_again),
    ],
)  # fmt: skip
def test_planted_faults_are_found(model, drafters, name, tree, fault):
    engine = stepped(model, drafters[name], tree, fault)
    assert difference(model, drafters[name], tree, engine) > 1e-2


def test_rows_that_move_hold_what_they_held(model, drafters):
    """Into another engine, as when a batch shrinks, and by copies of their beginnings, as for kept prompts."""
    engine = stepped(model, drafters["eagle"], "3x2x1")
    moved = opened(model, drafters["eagle"], "3x2x1", texts_of(engine)[:2])
    moved.copy_rows(engine, torch.tensor([2, 0]))
    moved.state.done[:] = False
    step_by_chance(moved, torch.Generator().manual_seed(2))
    assert difference(model, drafters["eagle"], "3x2x1", moved) < 1e-4


@pytest.mark.parametrize("name", ["eagle", "eagle+ngram", "draft+ngram"])
def test_kept_prompts_are_drafted_behind_as_if_read_anew(model, drafters, name):
    """Three turns of a talk: the same texts from the same drafts, with and without what was kept."""
    texts, cache = [[5, 9, 33, 12, 7, 40], [8, 20, 31, 44, 2, 6]], paceline.PromptCache()
    for turn in range(3):
        options = dict(drafter=drafters[name], do_sample=False, max_new_tokens=9, return_dict_in_generate=True)
        options |= dict(tree="3x2x1" + ("+chain:3" if "+" in name else ""), prefill_chunk=5)
        plain, kept = (paceline.generate(model, torch.tensor(texts), reuse=reuse, **options) for reuse in (None, cache))
        assert torch.equal(plain.sequences, kept.sequences)
        drafts = [[event.tokens for event in out.trace.events] for out in (plain, kept)]
        assert drafts[0] == drafts[1]
        texts = [[*row, 11 + turn, 30, 45] for row in plain.sequences.tolist()]
    assert cache.tokens_reused == 2 * (6 + 9 - 2) + 2 * (6 + 2 * 9 + 3 - 2)


def test_what_a_token_takes_is_counted(model, drafters):
    """Keys and values of one layer for the draft's pairs, and the feature; of two layers for a draft model's tokens."""
    layer, feature = 2 * 16 * 4, 32 * 4
    for name, size in (("eagle", layer + feature), ("draft", 2 * layer), ("draft+ngram", 2 * layer)):
        assert slot_bytes(model, drafters[name]) == size
    assert slot_bytes(model) == 2 * layer and slot_bytes(model, NgramDrafter()) == 0


def test_ties_orphan_no_child(model, ragged):
    """A network that finds all tokens equally likely at every node."""
    network = random_eagle(model, own_head=True, embedding_norm=True, feature_norm=True)
    network.lm_head.weight.zero_()
    options = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True)
    out = paceline.generate(model, *ragged, drafter=EagleDrafter(network), tree="dynamic:14x4x4", **options)
    assert torch.equal(out.sequences, paceline.generate(model, *ragged, **options).sequences)
    for event in out.trace.events:
        assert all(0 <= parent < node for node, parent in enumerate(event.parents[1:], 1))
        assert len({*zip(event.parents, event.tokens)}) == 14, "no node twice"
