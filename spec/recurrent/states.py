"""The states of a cache: what layers with convolutions and recurrences keep of each row, found as a model runs.

Which parts a layer has is not configured: they are made when the layer first asks the cache or calls its rule. Beside
them stands how many tokens of each row they hold, and which nodes were forwarded since: a commit absorbs only what was
forwarded, so that a node that a drafter never saw is read as text later. Knows nothing of keys and values.
"""

import torch
from torch import Tensor

from ..state import index_of
from ..tree import Ancestry, TokenTree
from .parts import Part, Window
from .passes import NodePass, Run, TextPass, chain


class LayerStates:
    """The convolutions of a layer, by transformers' number, and its rules, in the order of their calls."""

    def __init__(self, batch: int):
        self.batch = batch
        self.windows: dict[int, Window] = {}
        self.memories: list[Part] = []

    @property
    def parts(self) -> list[Part]:
        return [*self.windows.values(), *self.memories]

    def window(self, number: int) -> Window:
        return self.windows.setdefault(number, Window(self.batch))

    def memory(self, call: int, kind: type[Part]) -> Part:
        """The memory of a layer's rule at its `call`-th call."""
        if call == len(self.memories):
            self.memories.append(kind(self.batch))
        return self.memories[call]


class States:
    """The states of `batch` rows in `layers` layers, and the nodes of trees of at most `nodes` nodes."""

    def __init__(self, batch: int, layers: int, nodes: int, device: torch.device):
        self.layers = [LayerStates(batch) for _ in range(layers)]
        self.held = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens that the states stand for
        self.forwarded = torch.zeros(batch, nodes, dtype=torch.bool, device=device)
        self.chains: dict[int, TokenTree] = {}

    @property
    def parts(self) -> list[Part]:
        return [part for layer in self.layers for part in layer.parts]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part.tensors)

    def text(self, rows: Tensor | None, inside: Tensor) -> TextPass:
        """A forward that absorbs the tokens `inside` (R, n) behind what `rows` (R,) hold."""
        at = TextPass(rows, inside)
        if rows is None:
            self.held += at.count
        else:
            self.held[rows] += at.count
        return at

    def nodes(self, base: Tensor, tree: Ancestry, index: Tensor | None) -> NodePass:
        """A forward of the nodes of `tree`, whose root is at `base` (B,): all, or `index` (n,), each of which lies
        below another one forwarded before."""
        levels = getattr(tree, "max_depth", tree.size - 1) + 1 if index is None else 1
        every = torch.arange(tree.size, device=base.device) if index is None else index
        self.forwarded.index_fill_(1, every, True)
        return NodePass(tree, every, (self.held - base).clamp(min=0), levels)

    def last_text(self, first: Tensor, columns: int) -> NodePass:
        """A forward of so many tokens of the text, the first at position `first` (B,), which may be negative; those
        that the states hold already are passed over. `commit_text` absorbs the others."""
        if columns not in self.chains:
            self.chains[columns] = chain(columns, first.device)
        return self.nodes(first, self.chains[columns], None)

    def commit_text(self, first: Tensor, columns: int) -> None:
        path = torch.arange(columns, device=first.device).expand(len(first), -1)
        self.commit(first, path, torch.full_like(first, columns))

    def commit(self, base: Tensor, path: Tensor, count: Tensor) -> None:
        """Absorb the first `count` (B,) nodes of `path` (B, D+1), as far as they were forwarded and are not held."""
        columns, skip = torch.arange(path.shape[1], device=path.device), (self.held - base).clamp(min=0)
        seen = self.forwarded.gather(1, path) | (columns < skip[:, None])
        seen = seen.int().cumprod(1).bool() & (columns < count[:, None])
        inside = seen & (columns >= skip[:, None])
        run = Run(path, inside, inside.sum(1), skip)
        for part in self.parts:
            part.commit(run)
        self.held += run.count
        self.forwarded.fill_(False)

    def clear(self, rows: Tensor | None = None) -> None:
        index = index_of(rows)
        for tensor in (self.held, self.forwarded, *(tensor for part in self.parts for tensor in part.tensors)):
            tensor[index] = 0

    def copy_rows(self, other: "States", rows: Tensor, into: Tensor | None = None) -> None:
        """Copy the states of `rows` (R,) of `other` into the rows `into` (R,), None: into all. Between steps no node is
        forwarded."""
        self.clear(into)  # a source that has read nothing yet has no parts to copy
        index = index_of(into)
        self.held[index] = other.held[rows]
        for layer, source in zip(self.layers, other.layers):
            for number, window in source.windows.items():
                _copy(layer.window(number), window, rows, index)
            for call, memory in enumerate(source.memories):
                _copy(layer.memory(call, type(memory)), memory, rows, index)


def _copy(part: Part, source: Part, rows: Tensor, index: Tensor | slice) -> None:
    if source.state is not None:
        part.start(*source.state.shape[1:], like=source.state)[index] = source.state[rows]
