"""Medusa heads: several small heads on the target's last hidden state, each guessing one token further ahead.

Head k reads the state h_t from which the target chose the root x_{t+1}, and guesses x_{t+1+k}, the token at depth k
of the tree. It is one or more residual blocks, h + SiLU(A h + b), followed by the target's LM head (Medusa,
arXiv:2401.10774) or by an LM head of its own. Three modes:

    independent   Medusa: all nodes of a level share one distribution.
    markov        adds a low-rank bias U[x] V that depends on the token x drafted last.
    hydra         adds, in the first block, the embeddings of all tokens on the path, root included, each through a
                  matrix for its distance (Hydra, arXiv:2402.05109; here the heads share these matrices).

Heads may know only a part of the vocabulary. Caps and scales that a target applies to its logits do not change their
order, so the heads leave them out. Knows nothing of verification or training.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..spec.plan.trees import Rates, default_tree
from ..spec.proposal import DrafterTraits, DraftRequest
from ..spec.target.taps import HEAD, linear_head
from ..spec.target.weights import Weights, embedding_weight, head_rows, head_weight, linear_shape
from .blocks import GROUP, in_blocks
from .folder import DrafterFolder, target_identity, write_folder
from .head_session import MedusaSession, Started
from .head_settings import HeadSettings
from .known_tokens import check_vocabulary, places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A rough guess at p[depth][rank], for the default tree where no acceptance has been measured.
PRIOR = [[0.45 * 0.4**rank for rank in range(8)] for _ in range(16)]


class MedusaHeads(nn.Module):
    """The heads of mode `independent`, and the base class of the other modes. K heads, hidden size H, V' known tokens.

    The parameters of all heads are stacked. Blocks are initialised to zero, so that at first every head is the
    target's LM head. `vocabulary` (V',) are the known ids, ascending; None is all. Head k - 1 in code is head k of the
    paper.
    """

    vocabulary: Tensor  # (V',)
    index_of_token: Tensor  # (V,): the index of each token in `vocabulary`, V' for unknown ones
    head_weight: Tensor  # (V', H), not stored, or (K, V', H)
    head_bias: Tensor  # (V',)

    def __init__(self, settings: HeadSettings, target: "PreTrainedModel", vocabulary: Tensor | None = None):
        super().__init__()
        head = linear_head(target)
        self.settings = settings
        self.target = target_identity(target)
        self.origin: dict | None = None  # the heads that these went on from, as `origin_of` describes them
        self.vocab_size, self.hidden_size = linear_shape(head)
        count, size, device = settings.heads, self.hidden_size, target.device
        self.weight = nn.Parameter(torch.zeros(settings.blocks, count, size, size, device=device))
        self.bias = nn.Parameter(torch.zeros(settings.blocks, count, size, device=device))
        self.trimmed = vocabulary is not None and len(vocabulary) < self.vocab_size
        ids = torch.arange(self.vocab_size, device=device) if vocabulary is None else vocabulary.to(device)
        check_vocabulary(ids, self.vocab_size)
        self.register_buffer("vocabulary", ids, persistent=self.trimmed)
        self.register_buffer("index_of_token", places(ids, self.vocab_size), persistent=False)
        rows = head_rows(target, ids) if self.trimmed else head_weight(target)
        if settings.own_heads:
            self.head_weight = nn.Parameter(rows.float().repeat(count, 1, 1))
        else:
            self.register_buffer("head_weight", rows, persistent=False)
        bias = getattr(head, "bias", None)
        offset = torch.zeros(self.vocab_size, device=device) if bias is None else bias.detach()
        self.register_buffer("head_bias", offset[ids], persistent=False)
        self.blocks = nn.ModuleDict()  # layers in blocks, by name, in the place of dense ones
        self._layer: tuple[nn.Linear, ...] = ()  # a tuple, so that torch does not register it as a submodule

    def start(self, hidden: Tensor) -> Started:  # (..., H) -> (..., K, V')
        """The part of all heads' computation that depends on the hidden state alone."""
        return (self._logits(hidden[..., None, :], self._first(hidden), slice(None)),)

    def follow(self, started: Started, depth: int, path: Tensor) -> Tensor:  # (..., K, V') -> (..., V') float32
        """The logits for the children of nodes at `depth`; `path` (..., depth + 1) are the tokens from root to node."""
        (logits,) = started
        return logits[..., depth, :].float()

    def _first(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., K, H)
        """A h + b in the first block of every head."""
        if "first" in self.blocks:
            inner = self.blocks["first"](hidden)
        else:
            inner = F.linear(hidden, self.weight[0].flatten(0, 1), self.bias[0].flatten())
        return inner.unflatten(-1, (-1, self.hidden_size))

    def _logits(self, hidden: Tensor, first: Tensor, heads: slice) -> Tensor:  # (..., k, H) each -> (..., k, V')
        """Finish the first block of some `heads`, run the others and the LM head."""
        x = hidden + F.silu(first)
        for weight, bias in zip(self.weight[1:], self.bias[1:]):
            x = x + F.silu(torch.einsum("...kh,kgh->...kg", x, weight[heads]) + bias[heads])
        if self.settings.own_heads:
            return torch.einsum("...kh,kvh->...kv", x, self.head_weight[heads]) + self.head_bias
        if "head" in self.blocks:
            return self.blocks["head"](x)
        return self._layer[0](x) if self._layer else F.linear(x, self.head_weight, self.head_bias)

    def linears(self) -> list[nn.Linear]:
        """The LM head of the known tokens as an `nn.Linear` on the same memory, so that compiled steps can pack its
        weight. From now on the heads compute through it. Empty for heads with LM heads of their own."""
        weight = None if self.settings.own_heads or "head" in self.blocks else self.head_weight
        if weight is None or (self._layer and self._layer[0].weight.data_ptr() == weight.data_ptr()):
            return list(self._layer)
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, self.head_bias))
        self._layer = (layer,)
        return [layer]

    def put_in_blocks(self, weights: Weights) -> None:
        """From now on compute with layers in blocks of few bits, rounded from the dense ones, which are kept. An LM
        head that lies on the target's memory, and heads of their own, stay dense."""
        suitable = {name: layer for name, layer in self._dense().items() if layer[0].shape[1] % GROUP == 0}
        self.blocks = nn.ModuleDict({name: in_blocks(*layer, weights) for name, layer in suitable.items()})

    def _dense(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weight (N, K) and bias of the layers that blocks may take the place of."""
        dense: dict[str, tuple[Tensor, Tensor | None]] = {
            "first": (self.weight[0].flatten(0, 1), self.bias[0].flatten())
        }
        if self.trimmed and not self.settings.own_heads:
            dense["head"] = self.head_weight, self.head_bias if self.head_bias.any() else None
        return dense

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._layer = ()  # it refers to the weights before this change
        return super()._apply(*args, **options)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @classmethod
    def make(cls, settings: HeadSettings, target: "PreTrainedModel", vocabulary: Tensor | None = None) -> "MedusaHeads":
        """Untrained heads of the mode in `settings`. Trained weights are float32; tensors of the target keep its dtype
        and, where possible, share its memory. Convert with `.to(dtype)` before use."""
        return KINDS[settings.mode](settings, target, vocabulary)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a drafter folder, the weights in `dtype`. Tensors of the target are not stored."""
        sizes = {"vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "known_tokens": len(self.vocabulary)}
        config = {"paceline_drafter": "medusa", "paceline_target": self.target, **asdict(self.settings), **sizes}
        config |= {} if self.origin is None else {"paceline_start": self.origin}
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("blocks.")
        }
        write_folder(folder, config, tensors)

    @classmethod
    def load(cls, folder: DrafterFolder, target: "PreTrainedModel") -> "MedusaHeads":
        """The heads of a drafter folder in the target's dtype, on its device.

        Raises ValueError for settings or tensors that do not fit. The target's fingerprint is not checked here."""
        config = folder.config
        try:
            settings = HeadSettings(**{name: config[name] for name in HeadSettings.__dataclass_fields__})
            known, vocab_size = config["known_tokens"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"drafter {folder.path}: its config lacks {error.args[0]!r}; fetch it again") from None
        tensors = folder.tensors()
        vocabulary = None
        if known != vocab_size:
            vocabulary = tensors.get("vocabulary")
            if vocabulary is None or vocabulary.shape != (known,):
                raise ValueError(f"drafter {folder.path} lacks the list of its {known} tokens; fetch it again")
        heads = cls.make(settings, target, vocabulary)
        folder.check_tensors(tensors, heads.state_dict())
        heads.load_state_dict(tensors)
        heads.origin = config.get("paceline_start")
        return heads.to(target.dtype).requires_grad_(False).eval()


class MarkovHeads(MedusaHeads):
    """Mode `markov`: `independent` plus a bias of rank r that depends on the token drafted last, at every depth."""

    def __init__(self, settings: HeadSettings, target: "PreTrainedModel", vocabulary: Tensor | None = None):
        super().__init__(settings, target, vocabulary)
        known, rank, device = len(self.vocabulary), settings.rank, self.weight.device
        generator = torch.Generator().manual_seed(0)  # the same beginning on every machine
        rows = torch.randn(known + 1, rank, generator=generator) * rank**-0.5
        self.previous = nn.Parameter(rows.to(device))  # U; the last row is for tokens that the heads do not know
        self.following = nn.Parameter(torch.zeros(rank, known, device=device))  # V

    def follow(self, started: Started, depth: int, path: Tensor) -> Tensor:
        bias = self.previous[self.index_of_token[path[..., -1]]] @ self.following  # (..., V')
        (logits,) = started
        return logits[..., depth, :].float() + bias.float()


class HydraHeads(MedusaHeads):
    """Mode `hydra`: the normalised embeddings of the path's tokens enter the first block of every head."""

    embeddings: Tensor  # (V, E), not stored

    def __init__(self, settings: HeadSettings, target: "PreTrainedModel", vocabulary: Tensor | None = None):
        super().__init__(settings, target, vocabulary)
        embeddings = embedding_weight(target)
        self.register_buffer("embeddings", embeddings, persistent=False)
        sizes = settings.heads, embeddings.shape[1], self.hidden_size
        self.path_weight = nn.Parameter(torch.zeros(*sizes, device=self.weight.device))  # (K, E, H), nearest first

    def start(self, hidden: Tensor) -> Started:  # (..., H) -> (..., H), (..., K, H)
        return hidden, self._first(hidden)

    def follow(self, started: Started, depth: int, path: Tensor) -> Tensor:
        hidden, first = started
        nearest_first = F.embedding(path.flip(-1), self.embeddings)  # (..., depth + 1, E)
        seen = F.rms_norm(nearest_first, nearest_first.shape[-1:]).to(self.dtype).flatten(-2)
        if (name := f"path_{depth}") in self.blocks:
            path_part = self.blocks[name](seen)
        else:
            path_part = seen @ self.path_weight[: depth + 1].flatten(0, 1)
        first = first[..., depth, :] + path_part  # (..., H)
        return self._logits(hidden[..., None, :], first[..., None, :], slice(depth, depth + 1))[..., 0, :].float()

    def _dense(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        paths = (self.path_weight[: depth + 1].flatten(0, 1).T for depth in range(self.settings.heads))
        return super()._dense() | {f"path_{depth}": (weight, None) for depth, weight in enumerate(paths)}


KINDS: dict[str, type[MedusaHeads]] = {"independent": MedusaHeads, "markov": MarkovHeads, "hydra": HydraHeads}


class MedusaDrafter:
    """Heads as a drafter. `rates` is the acceptance p[depth][rank] from which the default tree is planned."""

    def __init__(self, heads: MedusaHeads, name: str = "medusa", rates: Rates | None = None):
        self.heads = heads
        self.name = name
        self.traits = DrafterTraits(
            heads.vocab_size, taps=(HEAD,), follows_any_tree=True, deepest=heads.settings.heads, modules=(heads,),
            remembers=False, kind="medusa",
        )  # fmt: skip
        self.rates = rates or PRIOR
        self.default_shape = default_tree(self.rates, self.traits.deepest, heads.weight.device.type == "cpu")

    @classmethod
    def load(cls, source: str | Path, folder: DrafterFolder | None, target: "PreTrainedModel") -> "MedusaDrafter":
        """The drafter of a folder. Raises ValueError for one that is damaged."""
        assert folder is not None, "heads are found in folders only"
        return cls(MedusaHeads.load(folder, target), Path(str(source)).name, folder.rates())

    def put_in_blocks(self, weights: Weights) -> None:
        """Round the heads, which are the drafter's own, to blocks of few bits."""
        self.heads.put_in_blocks(weights)
        self.name += f" in {weights.name}"

    def open(self, request: DraftRequest) -> MedusaSession:
        return MedusaSession(self.name, self.heads, request)
