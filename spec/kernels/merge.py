"""A pass over the graphs of compiled steps: linear layers that share an input become one call of our operator.

Each call costs a start and an end of all threads, which is much beside a layer that is read in some microseconds. Which
layers share an input is read off the graph, so that no layer's name matters. Knows nothing of models.
"""

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class MergeLinears(CustomGraphPass):
    """Merges the `paceline::linears` of a graph that have the same input and format."""

    def __call__(self, graph: fx.Graph) -> None:
        known: dict[tuple, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.paceline.linears.default):
            x, _, _, format = node.args
            known.setdefault((x, *format), []).append(node)
        order = {node: index for index, node in enumerate(graph.nodes)}
        for nodes in known.values():
            first, *others = nodes
            early = [node for node in others if all(order[part] < order[first] for part in node.args[1])]
            if early:
                _merge(graph, [first, *early])

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Put one call in the place of the first of `nodes`, whose weights are all there by then."""
    x, _, _, format = nodes[0].args
    packed, outputs = _all(node.args[1] for node in nodes), _all(node.args[2] for node in nodes)
    with graph.inserting_before(nodes[0]):
        merged = graph.call_function(nodes[0].target, (x, packed, outputs, format))
    merged.meta["val"] = _all(node.meta["val"] for node in nodes)
    start = 0
    for node in nodes:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.args = (merged, start + user.args[1])
        start += len(node.args[1])
        graph.erase_node(node)


def _all(lists: Iterable[list]) -> list:
    return [part for each in lists for part in each]
