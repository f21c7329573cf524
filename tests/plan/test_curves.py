"""Step-time curves: from few points, of how many engines at a time, and what a step is foretold to take."""

import gc
import weakref

import paceline
import pytest
from paceline.drafters.beside import Beside
from paceline.drafters.medusa import MedusaDrafter
from paceline.spec.plan import curves
from paceline.spec.plan.curves import Curves, measure, moved, rising, scaled
from paceline.spec.tree import TreeShape

from support.models import fitted_heads, noisy_copy, tiny_llama


def test_between_compiled_points_the_eager_curve_gives_the_form():
    eager = {1: 2.0, 5: 2.5, 9: 3.0, 16: 6.0, 32: 8.0}
    assert moved(eager, {1: 1.0, 9: 2.0, 32: 7.0}) == pytest.approx({1: 1.0, 5: 1.5, 9: 2.0, 16: 5.0, 32: 7.0})
    growing = moved(eager, {1: 1.0, 9: 1.2, 32: 8.0})  # compiling saves 1, 1.8 and 0: at 5 it saves 1.4
    assert growing == pytest.approx({1: 1.0, 5: 1.1, 9: 1.2, 16: 6 - 1.8 * 16 / 23, 32: 8.0})


def test_a_small_step_that_was_disturbed_costs_no_more_than_a_larger_one():
    assert rising({1: 9.0, 2: 2.0, 5: 3.0, 9: 2.5}) == {1: 2.0, 2: 2.0, 5: 2.5, 9: 2.5}


def test_drafting_is_in_proportion_to_its_eager_seconds():
    assert scaled({0: 0.0, 1: 2.0, 4: 6.0}, 4, 3.0) == {0: 0.0, 1: 1.0, 4: 3.0}
    assert scaled({0: 0.0, 1: 0.0, 4: 0.0}, 4, 2.0) == {0: 0.0, 1: 0.5, 4: 2.0}


def test_a_step_is_foretold_from_its_nodes_and_the_levels_of_each_drafter():
    measured = Curves({1: 1.0, 9: 9.0}, ({0: 0.0, 4: 40.0}, {0: 0.0, 8: 800.0}))
    two = TreeShape.parse("2x1").beside(TreeShape.chain(3))
    assert len(two) == 8 and measured.step(two) == 8 + 20 + 300
    alone = Curves(measured.target, measured.drafts[:1])
    assert alone.step(TreeShape.chain(6)) == 7 + 40, "beyond the deepest level that was timed nothing is added"
    assert Curves(measured.target, ()).step(TreeShape.chain(2)) == 3


def test_engines_are_timed_alone_twice_and_dropped(monkeypatch):
    living: weakref.WeakSet = weakref.WeakSet()
    blocks, most = [], []

    def alone(model, runner):
        again = runner in living
        living.add(runner)
        gc.collect()
        most.append(len(living))
        blocks.append(id(runner))
        return 1.0 if again else 2.0

    monkeypatch.setattr(curves, "alone", alone)
    model = tiny_llama()
    drafters = [paceline.load_drafter(noisy_copy(model), model), paceline.load_drafter("ngram", model)]
    gc.collect()
    gc.freeze()  # else each collection looks through all that was ever imported
    try:
        measured = measure(model, drafters, "eager")
    finally:
        gc.unfreeze()
    assert list(measured.target) == [1, 2, 5, 9, 16, 32] and [list(curve) for curve in measured.drafts] == [
        [0, 1, 4, 8],
        [0, 1, 8],
    ]
    assert len(blocks) == 2 * 11 and max(most) <= 2, "no more than two engines at a time"
    assert set(measured.target.values()) == {1.0}, "the smaller of both blocks counts"


def test_few_steps_are_compiled(monkeypatch):
    """Compiled steps take half of the time of eager ones, and a drafter takes a node's time for each level."""
    made = []

    def open_idle(model, executor, drafter, shape, sampling=None):
        made.append((executor, len(shape)))
        return executor, len(shape) + (shape.max_depth if drafter.name in known else 0)

    def alone(model, runner):
        executor, cost = runner
        return cost * (0.5 if executor == "compiled" else 1.0)

    monkeypatch.setattr(curves, "open_idle", open_idle)
    monkeypatch.setattr(curves, "alone", alone)
    model = tiny_llama()
    lookup = paceline.load_drafter("ngram", model)
    heads = MedusaDrafter(fitted_heads(model, "hydra"), "heads")
    known = {lookup.name, heads.name, "heads+ngram"}
    both = Beside(heads, lookup)
    measured = measure(model, [lookup, both], "compiled")
    nodes = sorted(nodes for executor, nodes in made if executor == "compiled")
    assert nodes == sorted([1, 9, 32, len(lookup.default_shape), len(both.default_shape)])
    assert measured.target == pytest.approx({size: size / 2 for size in (1, 2, 5, 9, 16, 32)})
    own, first, second = measured.drafts
    assert own[1] == pytest.approx(0.5) and own[8] == pytest.approx(4), "in proportion, beyond the default tree too"
    cost = sum(measured.of(1, 3).drafting(both.default_shape))
    assert cost == pytest.approx(both.default_shape.max_depth / 2), "what both take together is divided among them"
    assert first[3] / first[1] == pytest.approx(3) and second[8] / second[1] == pytest.approx(8)


def test_a_drafter_with_a_large_default_tree_is_timed_by_a_chain(monkeypatch):
    monkeypatch.setattr(curves, "open_idle", lambda model, executor, drafter, shape, sampling=None: len(shape))
    monkeypatch.setattr(curves, "alone", lambda model, nodes: float(nodes))
    model = tiny_llama()
    for shape in (TreeShape.chain(0), TreeShape.chain(40)):
        lookup = paceline.load_drafter("ngram", model)
        monkeypatch.setattr(type(lookup), "default_shape", shape)
        assert measure(model, [lookup], "compiled").drafts == ({0: 0.0, 1: 0.0, 8: 0.0},)
