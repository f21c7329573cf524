"""The drafter protocol, and the proposal that a drafter hands to a verification rule.

A drafter knows nothing of verification and a rule nothing of drafters. The proposal states how its tokens were drawn
(`law`) and with whose noise, and the rule decides whether it can verify that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeGuard, get_args

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
Coupling = Literal["own", "shared"]  # whose noise: the drafter's, or the target's
LAWS, COUPLINGS = get_args(Law), get_args(Coupling)
NO_TOKEN = -1  # a node for which the drafter has nothing to propose; no rule accepts it


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A filled tree. Node 0 of `tokens` is the root, the last committed token.

    `draft_logits[:, i]` are the logits, already divided by the temperature, from which the children of node i were
    drawn. Only those of nodes with children are read; a deterministic proposal has none.
    """

    tokens: Tensor  # (B, N), NO_TOKEN where nothing is proposed
    tree: TokenTree
    law: Law
    coupling: Coupling
    draft_logits: Tensor | None = None  # (B, N, V)

    def __post_init__(self) -> None:
        """Raises ValueError for what can be seen without reading the tokens."""
        if self.tokens.shape[1] != self.tree.size:
            raise ValueError(
                f"a drafter proposes {self.tokens.shape[1]} tokens for a tree of {self.tree.size} nodes; give one for "
                "each node, the root included, and NO_TOKEN where it has none"
            )
        for name, value, known in (("law", self.law, LAWS), ("coupling", self.coupling, COUPLINGS)):
            if value not in known:
                raise ValueError(f"a drafter proposes with {name}={value!r}; give one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class DraftSampling:
    """How a drafter draws: not at all (greedy), with the target's noise (coupled), or with noise of its own. The
    temperature is per row: `state.temperature`."""

    coupling: Coupling | Literal["none"] = "none"

    @property
    def source(self) -> Coupling:
        """The `coupling` of a proposal drawn in this way."""
        return "shared" if self.coupling == "shared" else "own"

    def gumbel(self, keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor | float:
        """The noise at positions (B, P) of tokens (K,) or (B, P, K): (B, P, K), or 0 for greedy drafts.

        The top-k of tempered logits plus noise are k tokens drawn without replacement (Gumbel top-k)."""
        if self.coupling == "none":
            return 0.0
        return noise.gumbel(keys, positions, noise.TARGET if self.coupling == "shared" else noise.DRAFT, tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a tree that one of several drafters fills: the root and some branches."""

    whole: TreeShape  # what the target checks, and whose paths a session is told to follow
    nodes: tuple[int, ...]  # of the whole tree, ascending from the root on: number i of the drafter's own shape

    @property
    def depth_of_others(self) -> int:
        """The depth of the deepest node that is another drafter's, 0 where there is none."""
        return max(self.whole.depths[node] for node in {*range(len(self.whole))} - {*self.nodes[1:]})


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a drafter needs to know to open a session: sizes, the shape to fill, how to draw."""

    batch: int
    capacity: int  # slots a cache of the text needs, drafted nodes and the padding slot included
    vocab_size: int
    device: torch.device
    shape: TreeShape | DynamicShape
    sampling: DraftSampling
    target: "PreTrainedModel | None" = None  # its states, LM head or embeddings may be read
    share: Share | None = None  # None: no other drafter fills a part of the tree
    may_wait: bool = False  # a step waits for the host anyway, so that a proposal may, too

    @property
    def whole_depth(self) -> int:
        """The most drafted tokens that one step can commit, whoever drafted them."""
        return (self.shape if self.share is None else self.share.whole).max_depth

    @property
    def fixed_shape(self) -> TreeShape:
        """The shape, for drafters that fill fixed trees only."""
        assert isinstance(self.shape, TreeShape), "open_engine refuses what the drafter cannot fill"
        return self.shape


@dataclass(frozen=True, slots=True, eq=False)
class DrafterTraits:
    """What other code may know of a drafter: its requirements and abilities."""

    vocab_size: int | None = None  # None: any vocabulary
    taps: tuple[Tap, ...] = ()  # the target's hidden states that its sessions are handed as features
    follows_any_tree: bool = False  # can follow a path whose nodes it did not draft
    fills_dynamic: bool = False  # can fill dynamic shapes, too
    deepest: int = 8  # levels of a tree planned for it
    modules: tuple[nn.Module, ...] = ()  # the modules that it runs; drafters of equal weights are equal
    vocabulary: Tensor | None = None  # (V',): the ids that it drafts, ascending; None: all
    reads: Tensor | None = None  # (V,): what each id is in its own vocabulary, where that is another one
    causal_lm: "PreTrainedModel | None" = None  # the draft as an ordinary causal LM with logits of the whole vocabulary
    parts: tuple["Drafter", ...] = ()  # the drafters of which this one is a combination
    remembers: bool = True  # its sessions keep of a text what reading one more token would not give them
    catches_up: bool = False  # its sessions can read, without features, what they followed but did not draft behind
    kind: str = ""  # its name in the registry of kinds (`paceline_drafter`); "": in none


class DraftSession(Protocol):
    """One decoding run of a drafter: persistent buffers, each with the batch row as its first axis."""

    @property
    def packable(self) -> Sequence[nn.Module]:
        """The models and layers whose linear weights compiled steps may repack into a faster layout."""

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""

    def clear(self, rows: Tensor | None = None) -> None:
        """Forget the texts of all rows, or of `rows` (R,)."""

    def read(self, span: "Span", features: Tensor | None) -> None:
        """Append a span of committed text to what its rows hold. `features` (R, n, F) are the target's at these
        positions, None for a drafter without taps, and (`catches_up`) for positions that were followed before."""

    def propose(self, state: "DecodeState") -> Proposal:
        """Fill the tree behind the last committed token. Static shapes, no host reads."""

    def follow(self, base: Tensor, path: Tensor, count: Tensor, features: Tensor | None) -> None:
        """Append the accepted nodes: the first `count` (B,) of each row's `path` (B, D+1), 0 for a row that is done.
        The root of the tree is at position `base` (B,); `features` (B, N, F) are the target's at all nodes."""

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        """Copy `rows` (R,) of `other`, which may have another number of rows and another capacity, into the rows
        `into` (R,) of this session; None: into all of them, in order."""


class Unremembering:
    """Base class of sessions without buffers of their own, which draft from the decode state alone."""

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

    def copy_rows(self, other: Self, rows: Tensor, into: Tensor | None = None) -> None:
        pass


class Drafter(Protocol):
    """Opens sessions that propose tokens."""

    @property
    def name(self) -> str:
        """Its name in messages and records."""

    @property
    def default_shape(self) -> TreeShape:
        """The tree that is drafted where the user asks for no other."""

    @property
    def traits(self) -> DrafterTraits:
        """Its requirements and abilities."""

    def open(self, request: DraftRequest) -> DraftSession:
        """Allocate a session's buffers. Raises ValueError for a request it cannot serve."""


ATTRIBUTES = ("name", "default_shape", "traits", "open")


def is_drafter(value: object) -> TypeGuard[Drafter]:
    """Whether `value` is an object with the attributes of a drafter."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ATTRIBUTES)


def check_drafter(value: Any) -> Drafter:
    """`value` itself. Raises ValueError unless it is a drafter object, with what it lacks to be one."""
    if is_drafter(value):
        return value
    if isinstance(value, type):
        raise ValueError(f"drafter is the class {value.__name__}; pass an object of it, {value.__name__}(...)")
    absent = [name for name in ATTRIBUTES if not hasattr(value, name)]
    if len(absent) < len(ATTRIBUTES) - 1:  # a name alone has much else
        raise ValueError(
            f"drafter is a {type(value).__name__} without {' and '.join(absent)}; give it what the protocol Drafter of "
            "paceline.spec.proposal asks for"
        )
    raise ValueError(
        f"drafter is a {type(value).__name__}; pass a name, a folder, a causal LM or what load_drafter returns"
    )


def loaded_drafter(drafter: Any, model: "PreTrainedModel") -> Drafter:
    """The drafter object that `drafter` stands for: an object, a causal LM, or a name or folder, which is kept loaded
    with `model`; None drafts nothing. Raises ValueError for anything else."""
    if drafter is None:
        return NoDrafter()
    if not isinstance(drafter, (str, Path, nn.Module)):
        return check_drafter(drafter)
    return import_module("..drafters.kept", __package__).kept_drafter(drafter, model)


def parts_of(drafter: Drafter) -> tuple[Drafter, ...]:
    """The drafters that `drafter` combines, or itself alone."""
    return drafter.traits.parts or (drafter,)


@dataclass(frozen=True, slots=True)
class NoDrafter:
    """Proposes nothing: plain autoregressive decoding by the same loop, step and rules."""

    name = "none"
    default_shape = TreeShape.chain(0)
    traits = DrafterTraits(follows_any_tree=True, remembers=False)

    def open(self, request: DraftRequest) -> "EmptySession":
        return EmptySession(TokenTree.of(self.default_shape, request.device))


@dataclass(frozen=True, slots=True, eq=False)
class EmptySession(Unremembering):
    """A session that always proposes a tree of the root alone."""

    tree: TokenTree

    def propose(self, state: "DecodeState") -> Proposal:
        return Proposal(state.roots(), self.tree, "deterministic", "own")


def divided(shape: TreeShape) -> tuple[list[int], list[int]]:
    """The nodes of the first of two drafters that share a tree, and of the second; both lists include the root. The
    second drafter's are the root's last child and everything below it."""
    branch = set(shape.children[0][-1:])  # none in a tree of the root alone
    for node, parent in enumerate(shape.parents):
        if parent in branch:
            branch.add(node)
    return [node for node in range(len(shape)) if node not in branch], [0, *sorted(branch)]
