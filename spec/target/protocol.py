"""The target protocol: what the decode step needs of a target, whatever runs the model.

A target reads prompts, computes the logits of a tree of drafted tokens, and keeps those that were accepted. For
drafters that need hidden states it also returns *features*: the concatenated states at the drafter's *taps*, for every
position of the prompt and every node of the tree. Knows nothing of drafters and rules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from ..proposal import Proposal
from ..state import index_of
from .taps import Tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .given import GivenPrompt


@dataclass(frozen=True, slots=True)
class TargetTraits:
    """Sizes and abilities of a target."""

    batch: int
    capacity: int  # slots of a row: for its text, the nodes behind it, and one more
    device: torch.device
    vocab_size: int
    taps: tuple[Tap, ...] = ()
    feature_size: int = 0  # F, of the taps together
    static: bool = True  # a forward never waits for the host, so that a step can be compiled or captured


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A chunk of consecutive tokens of some committed texts, read in one forward."""

    rows: Tensor | None  # (R,): their rows in the batch; None: all
    tokens: Tensor  # (R, n)
    positions: Tensor  # (R, n), -1 (padding) where a text is shorter
    reach: int  # all positions are below it
    lengths: Tensor  # (R,): of the whole texts
    beside: Tensor  # (R,): how much longer the longest text of the batch is

    @property
    def index(self) -> Tensor | slice:
        """Index of the rows in a buffer whose first axis is the batch."""
        return index_of(self.rows)


def spans(
    tokens: Tensor,
    lengths: Tensor,
    chunk: int,
    rows: Tensor | None = None,
    held: Tensor | None = None,
    beside: Tensor | None = None,
    ends: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Span]:
    """Split the texts `tokens` (B, T) of `lengths` (B,), or those of `rows` (R,), into spans of `chunk` positions, so
    that memory does not grow with the prompt. The last token of each text, the root of the first tree, is left out, and
    so are the first `held` (B,) tokens. `beside` (B,) is how much longer the longest text of their batch is.

    `ends` says of each of these texts how many tokens are held, and how many are to be read; without it the host waits
    for the device to know that."""
    held, beside = (torch.zeros_like(lengths) if given is None else given for given in (held, beside))
    if rows is not None:
        tokens, lengths, held, beside = tokens[rows], lengths[rows], held[rows], beside[rows]
    left = lengths - 1 - held
    ends = [*zip(held.tolist(), left.tolist())] if ends is None else ends
    width = max(count for _, count in ends)
    for start in range(0, width, chunk):
        columns = torch.arange(start, min(start + chunk, width), device=tokens.device)
        positions = torch.where(columns < left[:, None], held[:, None] + columns, -1)  # (R, n)
        reach = max(first + min(count, start + len(columns)) for first, count in ends)
        yield Span(rows, tokens.gather(1, positions.clamp(min=0)), positions, reach, lengths, beside)


def unread(span: Span, held: Tensor) -> Span:
    """What of `span` lies behind the first `held` (R,) tokens of its texts, moved to the front; the rest is padding."""
    width = span.tokens.shape[1]
    passed = (held - span.positions[:, 0]).clamp(min=0)  # (R,): columns
    columns = torch.arange(width, device=held.device) + passed[:, None]  # (R, n)
    source = columns.clamp(max=width - 1)
    positions = torch.where(columns < width, span.positions.gather(1, source), -1)
    return replace(span, tokens=span.tokens.gather(1, source), positions=positions)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """The results of a forward at the nodes of a tree."""

    logits: Tensor  # (B, N, V) float32
    features: Tensor | None  # (B, N, F), where there are taps


@dataclass(frozen=True, slots=True, eq=False)
class Unscored:
    """The results of a forward of a tree so large that its logits are only computed where they are asked for."""

    logits_at: Callable[[Tensor], Tensor]  # nodes (B, n) -> (B, n, V) float32
    features: Tensor | None  # (B, N, F), where there are taps


@runtime_checkable
class Resumable(Protocol):
    """A target, or a drafter's session, that can hand over the beginning of a row and go on from it in another run."""

    def save_row(self, row: int, count: int) -> Any:
        """Copies of what `row` holds of its first `count` tokens."""

    def load_row(self, row: int, saved: Any, count: int) -> None:
        """Hold the first `count` tokens of what `save_row` gave, in a row that is clear. At least one more is read."""


def can_resume(part: Any) -> bool:
    """Whether a target or session hands over the beginning of a row: states are those of its whole text."""
    return isinstance(part, Resumable) and getattr(part, "resumable", True)


@runtime_checkable
class TakesPrompts(Protocol):
    """A target that can go on from prompts that the model's own forward has read."""

    def take_over(self, prompt: "GivenPrompt") -> None:
        """Hold the prompts of all rows, which are clear."""


class Target(Protocol):
    """B rows of committed text, cached up to, but without, the root of the next tree.

    Only `clear`, `read`, `commit` and `copy_rows` change the committed state. Rows do not affect one another.
    """

    model: "PreTrainedModel | None"  # the model that it runs; None while the run is unused in a pool

    @property
    def traits(self) -> TargetTraits: ...

    @property
    def nbytes(self) -> int:
        """Bytes of its caches."""

    @property
    def packable(self) -> Sequence[nn.Module]:
        """Models whose linear weights compiled steps may repack into a faster layout."""

    def clear(self, rows: Tensor | None = None) -> None:
        """Clear all rows, or `rows` (R,)."""

    def read(self, span: Span) -> Tensor | None:
        """Append a span to what its rows hold; returns the features (R, n, F) of its positions, None without taps."""

    def forward(self, proposal: Proposal, base: Tensor) -> Seen | Unscored:
        """Compute the logits of a tree whose root is at position `base` (B,). Changes no committed state, so that it
        may run twice. Static shapes; reads nothing on the host if `traits.static`. `Unscored` only where the engine is
        made for it."""

    def commit(self, base: Tensor, path: Tensor, count: Tensor) -> None:
        """Append the accepted nodes of the last forward, the first `count` (B,) of each row's `path` (B, D+1), 0 for a
        row that is done, at positions base, base + 1, ..."""

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        """Copy `rows` (R,) of `other`, which may have another number of rows and another capacity, into the rows
        `into` (R,) of this target; None: into all of them, in order."""
