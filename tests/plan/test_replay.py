"""Replays against real decoding: the same steps, for every tree, drafter and way of drawing."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.plan.replay import WIDE, Replay, follow, plan_by_replay
from paceline.spec.plan.trees import Acceptance
from paceline.spec.tree import TreeShape

from support.models import noisy_copy, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [TreeShape.parse(tree) for tree in ("chain:1", "chain:4", "chain:8", "4", "2x1x1x1x1")]
SHAPES += [WIDE, TreeShape(WIDE.parents[:12])]


def decoded(model, drafter, prompts, shape, temperature, new_tokens):
    """Steps and tokens of real decoding, one prompt after the other, each with its own seed."""
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    steps = tokens = 0
    for seed, ids in enumerate(prompts):
        out = paceline.generate(
            model, ids, drafter=drafter, tree=shape, seed=[seed], executor="eager", max_new_tokens=new_tokens,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        steps += len(out.trace.events)
        tokens += sum(len(event.committed) for event in out.trace.events)
    return steps, tokens


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["draft", "ngram"])
def test_a_replay_takes_the_steps_that_decoding_takes(name, temperature):
    model = tiny_llama(seed=3, eos_token_id=7)
    drafter = ModelDrafter(noisy_copy(model)) if name == "draft" else paceline.load_drafter("ngram", model)
    torch.manual_seed(0)
    prompts = [torch.randint(8, 61, (1, length)) for length in (3, 9, 1, 5)]
    replay = Replay(
        [follow(model, drafter, {"input_ids": ids}, "match", temperature, 30, seed) for seed, ids in enumerate(prompts)]
    )
    lengths = set()
    for shape in SHAPES:
        steps, tokens = decoded(model, drafter, prompts, shape, temperature, 30)
        assert (len(replay.walk(shape)), sum(map(len, replay.texts))) == (steps, tokens), shape
        lengths.add(steps)
    assert len(lengths) > 1, "trees that all take the same steps prove nothing"


def test_all_of_the_tested_trees_lie_within_the_wide_one():
    def paths(shape):
        found = {0: ()}
        for node, parent in enumerate(shape.parents[1:], 1):
            found[node] = (*found[parent], shape.children[parent].index(node))
        return set(found.values())

    assert all(paths(shape) <= paths(WIDE) for shape in SHAPES)


def test_p_at_the_steps_of_a_deep_tree_is_not_p_at_all_positions():
    """Half of the text is foreseen eight tokens ahead and half not at all: a long chain leaps over the easy half."""
    model = tiny_llama(seed=3)
    ngram, prompt = paceline.load_drafter("ngram", model), {"input_ids": torch.tensor([[5]])}
    events = follow(model, ngram, prompt, "match", 0.0, 40, 0)
    for place, event in enumerate(events):
        chain, node = [], 0
        while node in event.parents:
            node = event.parents.index(node)
            chain.append(node)
        event.accepted = chain[: 8 - place % 9] if place < 18 else []
    replay = Replay([events])
    everywhere, leaping = (replay.rates(TreeShape.chain(depth))[0][0] for depth in (0, 8))
    assert everywhere == pytest.approx(16 / 40) and leaping == pytest.approx(2 / 24)
    assert replay.tokens_per_step(TreeShape.chain(8)) == pytest.approx(40 / 24)
    assert Acceptance.of(events).rates()[0][0] == everywhere


def test_the_plan_is_the_best_of_those_that_came_up():
    model = tiny_llama(seed=3)
    drafter = ModelDrafter(noisy_copy(model))
    replay = Replay([follow(model, drafter, {"input_ids": torch.tensor([[5, 6, 9]])}, "match", 0.0, 40, 0)])
    cheap = plan_by_replay(replay, {1: 1.0, 32: 1.1}, {0: 0.0, 8: 0.1})
    assert cheap.speedup > 1.2 and cheap.tokens_per_step == pytest.approx(replay.tokens_per_step(cheap.shape))
    assert cheap.speedup == pytest.approx(cheap.plain_seconds * cheap.tokens_per_step / cheap.seconds_per_step)
    dear = plan_by_replay(replay, {1: 1.0, 32: 90.0}, {0: 0.0, 8: 90.0})
    assert dear.shape.parents == (-1,) and dear.speedup == 1.0
