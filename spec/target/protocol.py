"""The target as the decode step sees it: one protocol, whatever runs the model and wherever its weights are.

A target reads prompts, gives the logits of a tree of drafted tokens, and absorbs those that were accepted. A drafter
may ask for hidden states on the way: it names its *taps*, and the target hands over their concatenation, the features,
for every position of the prompt and every node of the tree. Knows nothing of drafters and rules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor, nn

from ..proposal import Proposal
from .taps import Tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TargetTraits:
    """What others may know of a target."""

    batch: int
    capacity: int  # slots of a row: for its text, the nodes behind it, and one more
    device: torch.device
    vocab_size: int
    taps: tuple[Tap, ...] = ()
    feature_size: int = 0  # F, of the taps together
    static: bool = True  # a forward waits for nothing on the host, so that a step may be compiled or captured


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Neighbouring tokens of some committed texts, to be absorbed together."""

    rows: Tensor | None  # (R,): the rows of the batch that they are of; None is all of them
    tokens: Tensor  # (R, n)
    positions: Tensor  # (R, n), -1 where a text is shorter
    reach: int  # no position is at it or beyond it

    @property
    def index(self) -> Tensor | slice:
        """What picks the rows out of a buffer whose first axis is the batch."""
        return slice(None) if self.rows is None else self.rows


def spans(tokens: Tensor, lengths: Tensor, chunk: int, rows: Tensor | None = None) -> Iterator[Span]:
    """The texts `tokens` (B, T) of `lengths` (B,), or those of `rows` (R,), all but the last token of each, which is
    the root of the first tree; `chunk` positions at a time, so that memory does not grow with the prompt."""
    if rows is not None:
        tokens, lengths = tokens[rows], lengths[rows]
    width = int(lengths.max()) - 1
    for start in range(0, width, chunk):
        columns = torch.arange(start, min(start + chunk, width), device=tokens.device)
        positions = torch.where(columns < lengths[:, None] - 1, columns, -1)  # (R, n)
        yield Span(rows, tokens[:, columns], positions, start + len(columns))


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a forward saw at the nodes of a tree."""

    logits: Tensor  # (B, N, V) float32
    features: Tensor | None  # (B, N, F), where there are taps


class Target(Protocol):
    """B rows of committed text, absorbed up to but without the root of the next tree.

    Committed state changes by `clear`, `read`, `commit` and `copy_rows` alone. Nothing of a row reaches another one.
    """

    model: "PreTrainedModel | None"  # that it runs; None while the run is at rest in a pool

    @property
    def traits(self) -> TargetTraits: ...

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps of the texts."""

    @property
    def packable(self) -> Sequence[nn.Module]:
        """Models whose linear layers compiled steps may keep in a layout of their own."""

    def clear(self, rows: Tensor | None = None) -> None:
        """Forget everything, or the texts of `rows` (R,)."""

    def read(self, span: Span) -> Tensor | None:
        """Absorb a span behind what its rows hold; the features (R, n, F) of its positions, where there are taps."""

    def forward(self, proposal: Proposal, base: Tensor) -> Seen:
        """See the nodes of a tree whose root is at position `base` (B,). Changes no committed state, so that it may
        run twice. Static shapes, and nothing read on the host where the traits say so."""

    def commit(self, base: Tensor, path: Tensor, count: Tensor) -> None:
        """Absorb the first `count` (B,) nodes of each row's `path` (B, D+1), as the last forward saw them: none for
        a row that is done. They come to stand at positions base, base + 1, ..."""

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        """Hold what `rows` (B,) of `other`, a target of the same capacity, hold."""
