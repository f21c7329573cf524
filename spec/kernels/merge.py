"""A pass over the graphs of compiled steps: linear layers that share an input become one call of our operator.

Each call costs a start and an end of all threads, which is much beside a layer that is read in some microseconds. Which
layers share an input is read off the graph, so that no layer's name matters. Knows nothing of models.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class MergeLinears(CustomGraphPass):
    """Merges the `paceline::linears` of a graph that have the same input and format."""

    def __call__(self, graph: fx.Graph) -> None:
        known: dict[tuple, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.paceline.linears.default):
            x, _, _, format = _arguments(node)
            known.setdefault((x, *format), []).append(node)
        order = {node: index for index, node in enumerate(graph.nodes)}
        for nodes in known.values():
            first, *others = nodes
            early = [node for node in others if all(order[part] < order[first] for part in _arguments(node)[1])]
            if early:
                _merge(graph, [first, *early])

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Of a call of our operator: x, packed, outputs, format."""
    return node.args


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Put one call in the place of the first of `nodes`, whose weights are all there by then."""
    x, _, _, format = _arguments(nodes[0])
    packed, outputs = _all(_arguments(node)[1] for node in nodes), _all(_arguments(node)[2] for node in nodes)
    with graph.inserting_before(nodes[0]):
        merged = graph.call_function(torch.ops.paceline.linears.default, (x, packed, outputs, format))
    merged.meta["val"] = _all(node.meta["val"] for node in nodes)
    results: list[tuple[fx.Node, Any]] = [(node, index) for node in nodes for index in range(len(_arguments(node)[1]))]
    for node in nodes:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.args = (merged, results.index((node, user.args[1])))
        graph.erase_node(node)


def _all(lists: Iterable[list]) -> list:
    return [part for each in lists for part in each]
