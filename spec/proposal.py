"""What passes between a drafter and a verification rule: the proposal, and the drafter protocol.

A drafter knows nothing of verification and a rule knows nothing of drafters; the proposal says by
which law the tokens were drawn and with whose noise, and the rule decides whether it can treat that
losslessly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from . import noise
from .target.taps import Tap
from .tree import DynamicShape, TokenTree, TreeShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .state import DecodeState
    from .target.protocol import Span

Law = Literal["deterministic", "iid", "without_replacement"]
Noise = Literal["own", "shared"]  # the drafter's, or the target's
NO_TOKEN = -1  # a node for which the drafter has nothing to propose; no rule accepts it


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A filled tree. Node 0 of `tokens` is the root, the last committed token.

    `draft_logits[:, i]` is the law, at the temperature drawn with, from which the children of node i
    come; only inner nodes' rows are read, and only the laws that draw have them.
    """

    tokens: Tensor  # (B, N), NO_TOKEN where nothing is proposed
    tree: TokenTree
    law: Law
    noise: Noise
    draft_logits: Tensor | None = None  # (B, N, V)


@dataclass(frozen=True, slots=True)
class DraftSampling:
    """How a drafter draws: not at all (greedy), coupled to the target's noise, or with its own. At which temperature
    is data of the row: `state.temperature`."""

    noise: Noise | Literal["none"] = "none"

    @property
    def source(self) -> Noise:
        """What a proposal drawn so says of its noise."""
        return "shared" if self.noise == "shared" else "own"

    def gumbel(self, keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor | float:
        """The noise at positions (B, P) of tokens (K,) or (B, P, K): (B, P, K), or 0 for greedy drafts.

        The top-k of tempered logits plus noise are k tokens drawn without replacement (Gumbel top-k)."""
        if self.noise == "none":
            return 0.0
        return noise.gumbel(keys, positions, noise.TARGET if self.noise == "shared" else noise.DRAFT, tokens)


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a drafter needs to know to open a session: sizes, the shape to fill, how to draw."""

    batch: int
    capacity: int  # slots a cache of the text needs, drafted nodes and the padding slot included
    vocab_size: int
    device: torch.device
    shape: TreeShape | DynamicShape
    sampling: DraftSampling
    target: "PreTrainedModel | None" = None  # whose hidden states a drafter reads, LM head and embeddings it may share

    @property
    def fixed_shape(self) -> TreeShape:
        """The shape, as a drafter sees it whose traits do not say that it fills dynamic ones."""
        assert isinstance(self.shape, TreeShape), "open_engine refuses what the drafter cannot fill"
        return self.shape


@dataclass(frozen=True, slots=True, eq=False)
class DrafterTraits:
    """What others may know of a drafter; everything but the defaults is said by the drafter itself."""

    vocab_size: int | None = None  # None: any vocabulary
    taps: tuple[Tap, ...] = ()  # the target's hidden states that its sessions are handed as features
    follows_any_tree: bool = False  # can follow a path whose nodes it did not draft
    fills_dynamic: bool = False  # can fill dynamic shapes, too
    deepest: int = 8  # levels of a tree planned for it
    modules: tuple[nn.Module, ...] = ()  # what it runs, whose weights make it the drafter that it is
    vocabulary: Tensor | None = None  # (V',): the ids that it drafts, ascending; None: all
    causal_lm: "PreTrainedModel | None" = None  # what other code can run as a draft model, of the whole vocabulary
    parts: tuple["Drafter", ...] = ()  # of a drafter that is several side by side
    kind: str = ""  # what files and configurations call it, so that its objective is found; "": nothing


class DraftSession(Protocol):
    """One decoding run of a drafter: persistent buffers, each with the batch row as its first axis."""

    @property
    def packable(self) -> Sequence[nn.Module]:
        """The models and layers that the session runs whose linear layers compiled steps may keep in a layout of
        their own."""

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""

    def clear(self, rows: Tensor | None = None) -> None:
        """Forget the texts of all rows, or of `rows` (R,)."""

    def read(self, span: "Span", features: Tensor | None) -> None:
        """Absorb a span of committed text behind what its rows hold, with the target's features (R, n, F) of its
        positions where the drafter has taps."""

    def propose(self, state: "DecodeState") -> Proposal:
        """Fill the tree behind the last committed token. Static shapes, no host reads."""

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        """Absorb the first `count` (B,) nodes of each row's `path` (B, D+1), none for a row that is done. The root of
        the tree is at position `base` (B,); `features` (B, N, F) are the target's of all its nodes."""

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        """Hold what `rows` (B,) of `other`, a session of the same capacity, hold."""


class Unremembering:
    """What a session has that keeps nothing from step to step: it drafts from the state alone."""

    @property
    def packable(self) -> Sequence[nn.Module]:
        return ()

    @property
    def nbytes(self) -> int:
        return 0

    def clear(self, rows: Tensor | None = None) -> None:
        pass

    def read(self, span: "Span", features: Tensor | None) -> None:
        pass

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        pass

    def copy_rows(self, other: Self, rows: Tensor) -> None:
        pass


class Drafter(Protocol):
    """A family of proposals."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def default_shape(self) -> TreeShape:
        """What is drafted where nothing else is asked for."""

    @property
    def traits(self) -> DrafterTraits:
        """What others may know of it."""

    def open(self, request: DraftRequest) -> DraftSession:
        """Allocate a session's buffers. Raises ValueError for a request it cannot serve."""


def is_drafter(value: object) -> TypeGuard[Drafter]:
    """Whether `value` has what a drafter has."""
    return all(hasattr(value, name) for name in ("name", "default_shape", "traits", "open"))


def parts_of(drafter: Drafter) -> tuple[Drafter, ...]:
    """The drafters that stand side by side in `drafter`, or that one alone."""
    return drafter.traits.parts or (drafter,)


@dataclass(frozen=True, slots=True)
class NoDrafter:
    """Proposes nothing: plain autoregressive decoding by the same loop, step and rules."""

    name = "none"
    default_shape = TreeShape.chain(0)
    traits = DrafterTraits(follows_any_tree=True)

    def open(self, request: DraftRequest) -> "EmptySession":
        return EmptySession(TokenTree.of(self.default_shape, request.device))


@dataclass(frozen=True, slots=True, eq=False)
class EmptySession(Unremembering):
    """A tree of nothing but the root."""

    tree: TokenTree

    def propose(self, state: "DecodeState") -> Proposal:
        return Proposal(state.roots(), self.tree, "deterministic", "own")
