"""Trees that would never come to an end are refused at once, and those within the bounds are what they were."""

import itertools
import json
import random
import time

import numpy as np
import paceline
import pytest
from paceline.spec.tree import MOST_DEPTH, MOST_NODES, DynamicShape, TokenTree, TreeShape

from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=12)


HUGE = [
    "100x100x100x100", "99999999x1", "4096", "chain:20000", "chain:513", "chain:" + "9" * 6000, "9" * 5000,
    "x".join(["1"] * 600), "1x" * 100_000 + "1", "dynamic:99999999x6x4", "dynamic:24x600x4", "dynamic:24x6x99999",
    "4x2x1+chain:5000", "1" + "+chain:1" * 5000, "1" + "+chain:500" * 100_000, [-1] + [0] * 5000,
    list(range(-1, 1000)), range(-1, 10**12), itertools.count(-1), np.arange(-1, 5000),
]  # fmt: skip


@pytest.mark.parametrize("tree", HUGE, ids=lambda tree: str(tree)[:24])
def test_trees_beyond_every_bound_are_refused_at_once(model, ids, tree):
    started = time.perf_counter()
    sentence(lambda: paceline.generate(model, ids, drafter="ngram", tree=tree, **GREEDY), "tree ", "; draft a s")
    assert time.perf_counter() - started < 2


def test_shapes_made_directly_have_the_same_bounds(tmp_path):
    for make in (
        lambda: TreeShape.chain(10**15),
        lambda: TreeShape.per_level([10**6] * 10),
        lambda: TreeShape(tuple(range(-1, 600))),
        lambda: TreeShape.per_level([4000]).beside(TreeShape.per_level([4000])),
        lambda: DynamicShape(10**9, 6, 4),
    ):
        sentence(make, "; draft a s")
    plan = dict(tokens_per_step=1.0, speedup=1.0, seconds_per_step=1.0, plain_seconds=1.0)
    (tmp_path / "plan.json").write_text(json.dumps({"tree": [-1, *[0] * 9000], **plan}))
    from paceline.spec.plan.store import read_shape

    sentence(lambda: read_shape(str(tmp_path / "plan.json"), None), f"more than {MOST_NODES} nodes")


def test_trees_within_the_bounds_are_what_they_were():
    for text, nodes, depth in (
        (f"chain:{MOST_DEPTH}", MOST_DEPTH + 1, MOST_DEPTH), (str(MOST_NODES - 1), MOST_NODES, 1),
        ("chain:03", 4, 3), ("4x2x1+chain:6+chain:2", 29, 6), ("63x64", 4096, 2), ("2+chain:0", 3, 1),
    ):  # fmt: skip
        shape = TreeShape.parse(text)
        assert (len(shape), shape.max_depth) == (nodes, depth)
    shape = TreeShape.parse("2x1+chain:3+chain:1")
    assert shape.parents == (-1, 0, 0, 0, 0, 1, 2, 3, 7) and shape.beside() == shape
    assert TreeShape.parse("2x1").beside(TreeShape.chain(3)).beside(TreeShape.chain(1)) == shape
    assert DynamicShape(4096, 512, 8).slots == 4096


def test_a_deep_tree_takes_memory_by_its_nodes_alone():
    """Ancestors, paths and depths of a large random tree against a walk up from some of its nodes."""
    dice = random.Random(1)
    shape = TreeShape((-1, *(max(0, node - dice.randint(1, 12)) for node in range(1, 1500))))
    assert 200 < shape.max_depth <= MOST_DEPTH
    tree = TokenTree.of(shape, "cpu")
    for node in dice.sample(range(1500), 50):
        path = [node]
        while shape.parents[path[0]] >= 0:
            path.insert(0, shape.parents[path[0]])
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == sorted(path)
        assert tree.paths[0, node, : len(path)].tolist() == path and tree.depths[0, node] == len(path) - 1
