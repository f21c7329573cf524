"""Trees: shapes as users write them, and the tensors derived from parents against a slow reference."""

import pytest
import torch
from hypothesis import given
from paceline.spec.tree import TokenTree, TreeShape

from support.trees import shapes


def climb(parents, node):
    """The nodes from the root to `node`."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@given(shapes())
def test_tensors_equal_the_slow_derivation(shape):
    tree = TokenTree.of(shape, "cpu")
    parents = shape.parents
    for node in range(len(shape)):
        path = climb(parents, node)
        assert tree.depths[0, node] == len(path) - 1 == shape.depths[node]
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == sorted(path)
        assert tree.paths[0, node].tolist() == path + [node] * (shape.max_depth - len(path) + 1)
        assert tree.ranks[0, node] == sum(parents[other] == parents[node] for other in range(node))
    assert list(shape.depths) == sorted(shape.depths), "nodes stand level by level"
    assert list(parents) == sorted(parents), "and siblings side by side"
    assert [len(level) for level in shape.levels] == [list(shape.depths).count(d) for d in range(shape.max_depth + 1)]
    assert tree.max_children == max(parents.count(node) for node in range(len(shape)))


def test_rows_may_have_trees_of_their_own():
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]])
    tree = TokenTree.from_parents(parents, max_depth=3, max_children=2)
    assert tree.depths.tolist() == [[0, 1, 1, 2], [0, 1, 2, 3]]
    assert tree.paths[0, 3].tolist() == [0, 1, 3, 3]
    assert tree.ranks.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


def test_shapes_as_users_write_them():
    assert TreeShape.parse("chain:3").parents == (-1, 0, 1, 2)
    assert TreeShape.parse("chain:0").parents == (-1,)
    assert TreeShape.parse("2x1x2").parents == (-1, 0, 0, 1, 2, 3, 3, 4, 4)
    assert TreeShape.parse([-1, 0, 1, 0]).parents == (-1, 0, 0, 1), "sorted by depth"
    assert TreeShape.parse([-1, 0, 0, 2, 1]).parents == (-1, 0, 0, 1, 2), "and by parent"
    assert TreeShape.parse(TreeShape.chain(2)) == TreeShape((-1, 0, 1))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("chain:x", "neither"),
        ("4x0", "neither"),
        ("", "neither"),
        ("4x-1", "neither"),
        ([0, 0], "parent must be -1"),
        ([], "parent must be -1"),
        ([-1, 1], "earlier node"),
        ([-1, -1], "earlier node"),
        ([-1, 0.5], "whole numbers"),
        (5, "neither"),
    ],
)
def test_malformed_trees_are_refused_with_the_rule(text, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        TreeShape.parse(text)
    assert "\n" not in str(caught.value)
