"""Which tree for how many rows, from times and from what was accepted."""

import itertools
import random
from types import SimpleNamespace

import pytest
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.plan.trees import expected_tokens
from paceline.spec.proposal import NoDrafter
from paceline.spec.serve.gears import Gears
from paceline.spec.serve.planner import PRIOR, STEADY, RowPlanner, Seen, candidates, expected_times, measured, promising
from paceline.spec.tree import TreeShape
from serve.playing import Play, scheduler_of, toy

from support.models import noisy_copy

NONE, CHAIN, TREE = TreeShape.chain(0), TreeShape.chain(3), TreeShape.parse("3x2x1")


def times_of(node, fixed=10.0, rows=(1, 2, 4, 8)):
    """A device on which rows and nodes cost alike beyond 8 of them."""
    return {
        (size, shape): fixed + node * max(0, size * len(shape) - 8)
        for size, shape in itertools.product(rows, (NONE, CHAIN, TREE))
    }


def report(shape, accepted):
    """Of a step in which the first child was accepted `accepted` times."""
    path = [0]
    for _ in range(accepted):
        path.append(shape.children[path[-1]][0])
    levels = shape.max_depth + 1
    return SimpleNamespace(path=[*path, *[path[-1]] * (levels - len(path))], accepted=accepted)


def test_large_trees_for_few_rows_and_none_for_many():
    planner = RowPlanner(times_of(2.0))
    assert [planner(rows) for rows in (1, 8)] == [CHAIN, NONE]
    assert [RowPlanner(times_of(0.0))(rows) for rows in (1, 8)] == [TREE, TREE]
    assert [RowPlanner(times_of(90.0))(rows) for rows in (1, 2, 4, 8)] == [CHAIN, CHAIN, NONE, NONE]


def test_it_is_the_best_of_all_by_hand():
    draw = random.Random(3)
    for _ in range(30):
        times = {key: draw.uniform(5, 20) for key in times_of(1.0)}
        planner = RowPlanner(times)
        for rows in (1, 2, 4, 8):
            speeds = {
                shape: expected_tokens(planner.seen.first.rates(), shape)
                / times[rows, shape]
                / (1.05 if shape != NONE else 1)
                for shape in (NONE, CHAIN, TREE)
            }
            assert planner(rows) == max(speeds, key=speeds.get)


def test_what_is_accepted_changes_the_plan_after_a_while():
    """Where nothing is accepted drafting ends, where all is it goes on with more rows; never to and fro."""
    planner = RowPlanner(times_of(0.5))
    assert planner(4) != NONE
    turns = 0
    while planner(4) != NONE:
        planner.learn(planner(4), [report(planner(4), 0)])
        turns += 1
        assert turns < 400
    assert turns > STEADY
    shapes = []
    for _ in range(300):
        planner.learn(CHAIN, [report(CHAIN, 3)])
        shapes.append(planner(4))
    assert shapes[-1] != NONE and sum(before != after for before, after in itertools.pairwise(shapes)) <= 3


def test_a_small_gain_and_a_short_one_change_nothing():
    times = {(1, NONE): 10.0, (1, CHAIN): 10.0 * expected_tokens(Seen().first.rates(), CHAIN) * 1.01}
    planner = RowPlanner(times)
    assert planner(1) == NONE
    times[1, CHAIN] *= 0.97
    assert [planner(1) for _ in range(50)] == [NONE] * 50, "two in a hundred"
    times[1, CHAIN] *= 0.8
    assert [planner(1) for _ in range(STEADY)] == [NONE] * (STEADY - 1) + [CHAIN]
    times[1, CHAIN] *= 2
    assert [planner(1) for _ in range(STEADY - 1)] == [CHAIN] * (STEADY - 1)
    times[1, CHAIN] /= 2
    assert [planner(1) for _ in range(20)] == [CHAIN] * 20


def test_drafting_must_be_worth_it():
    """A chain that promises 3 % more than plain steps is not taken, one that promises 8 % is; and it is given up where
    it comes to promise as much as they."""
    tokens = expected_tokens(Seen().first.rates(), CHAIN)
    assert RowPlanner({(8, NONE): 10.0, (8, CHAIN): 10.0 * tokens / 1.03})(8) == NONE
    planner = RowPlanner({(8, NONE): 10.0, (8, CHAIN): 10.0 * tokens / 1.08})
    assert planner(8) == CHAIN
    for accepted in [1, 0] * 200:
        planner.learn(CHAIN, [report(CHAIN, accepted)])
    assert planner.expected(CHAIN) < 1.6 < tokens
    assert [planner(8) for _ in range(2 * STEADY)][-1] == NONE


def test_counts_are_those_of_the_slots_of_a_tree():
    """Empty nodes, and second children of nodes whose first was accepted, are trials that failed."""
    seen = Seen([[0.5, 0.1]] * 3)
    shape = TreeShape.parse("2x2")
    seen.learn(shape, [report(shape, 2)])
    counts = seen.first
    assert counts.hits == [[1, 0], [1, 0], [0, 0]] and counts.trials == [[1, 1], [1, 1], [0, 0]]
    for _ in range(3000):
        seen.learn(shape, [report(shape, 1)])
    rates = counts.rates()
    assert rates[0][0] > 0.95 and rates[1][0] < 0.05 and rates[2][0] == 0.5


def test_what_two_drafters_bring_is_told_apart():
    """Half of the steps take a chain that was copied, the others one guess: by hand 1 + 0.5 * 2 + 0.5 * 1."""
    seen, shape = Seen(beside=True), TreeShape.chain(2).beside(TreeShape.chain(2))
    copied = shape.children[0][-1]
    paths = [0, copied, shape.children[copied][0]], [0, 1, 1]
    for _ in range(3000):
        seen.learn(shape, [SimpleNamespace(path=path, accepted=len({*path}) - 1) for path in paths])
    expected = seen.expectation()
    assert abs(expected(shape) - 2.5) < 0.1
    assert abs(expected(TreeShape.chain(1).beside(TreeShape.chain(1))) - 2.0) < 0.1
    assert abs(expected(TreeShape.chain(1).beside(TreeShape.chain(2))) - 2.5) < 0.1, (
        "the first's second guess never helps"
    )
    assert expected(NONE) == 1.0


def test_of_steps_that_take_long_to_make_those_with_the_best_trees_are_made():
    assert promising(RowPlanner(times_of(2.0))) == [(1, CHAIN), (1, NONE), (2, CHAIN), (2, NONE), (4, NONE), (8, NONE)]
    nearly = times_of(2.0) | {(4, CHAIN): 10.0 * expected_tokens(PRIOR, CHAIN) * 1.2}
    assert (4, CHAIN) in promising(RowPlanner(nearly)), "perhaps more will be accepted"
    always = {(rows, shape): time for (rows, shape), time in times_of(2.0).items() if shape != NONE}
    assert promising(RowPlanner(always)) == [(1, CHAIN), (2, CHAIN), (4, CHAIN), (8, CHAIN)], "it has to draft"


def test_what_compiled_steps_take_is_expected_from_eager_ones():
    eager = {(1, NONE): 20.0, (1, CHAIN): 25.0, (4, NONE): 24.0, (4, TREE): 44.0}
    expected = {(1, NONE): 12.0, (1, CHAIN): 17.0, (4, NONE): 18.0, (4, TREE): 38.0}
    assert expected_times(eager, {(1, NONE): 12.0, (4, NONE): 18.0}) == expected
    assert expected_times(eager, {}) == eager, "of a drafter that has to draft"


def test_trees_that_are_tried():
    model = toy()
    draft = ModelDrafter(noisy_copy(model))
    assert candidates(NoDrafter()) == [NONE]
    for drafter in (NgramDrafter(), draft, Beside(draft, NgramDrafter())):
        shapes = candidates(drafter)
        assert NONE in shapes and drafter.default_shape in shapes and len({*shapes}) == len(shapes) >= 5
        assert {*candidates(drafter, few=True)} == {NONE, drafter.default_shape}


@pytest.mark.parametrize("drafter", ["ngram", "both"])
def test_times_are_measured_once_and_a_plan_by_them_serves(drafter, tmp_path):
    model = toy()
    drafting = NgramDrafter() if drafter == "ngram" else Beside(ModelDrafter(noisy_copy(model)), NgramDrafter())
    path = tmp_path / "kept" / "times.json"
    gears, pairs = Gears(model, drafting, 40, 2, 8), [*itertools.product((1, 2), candidates(drafting))]
    times = measured(gears, pairs, path)
    assert times.keys() == {*pairs} and min(times.values()) > 0 and measured(gears, pairs, path) == times
    planner = RowPlanner(times)

    def learn(arrival, gear):
        planner.learn(gear.shape, [*arrival.reports.values()])

    scheduler = scheduler_of(model, drafting, planner, rows=2, on_step=learn)
    for seed in range(3):
        assert Play(model, scheduler, seed).run().faults() == []
