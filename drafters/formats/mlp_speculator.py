"""IBM's MLP speculator (arXiv:2404.19124): a hidden state that takes up one drafted token after another.

From the target's last hidden state s, guess i of a path with tokens x is

    s <- GELU(rms(proj_i s + (w_e / w_s) emb_i[x_i]) * weight_i + bias_i),    logits = head_i s

where w_s = 0.5^(0.5/n) for n guesses, w_e = sqrt((1 - w_s^2) inner / 2), and with `scale_input` s begins as
rms(s) / sqrt 2. Files whose guesses share parts hold those once. Its session is that of Medusa heads.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...spec.plan.trees import default_tree
from ...spec.proposal import DrafterTraits, DraftRequest
from ...spec.target.taps import HEAD, linear_head
from ...spec.target.weights import linear_shape
from ..head_session import MedusaSession, Started
from ..head_settings import HeadSettings
from ..medusa import PRIOR
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPSILON = 1e-6  # of its norms


class MlpSpeculator(nn.Module):
    """The network, of the tensors of a file: width H of the target, `inner` numbers of state, n guesses."""

    hidden_size: int

    def __init__(self, tensors: dict[str, Tensor], guesses: int, scale_input: bool):
        super().__init__()
        self.settings = HeadSettings(heads=guesses)
        self.scale_input, self.trimmed = scale_input, False

        def parts(beginning: str, ending: str = "weight") -> list[Tensor]:
            names = [name for name in tensors if name.startswith(f"{beginning}.") and name.endswith(ending)]
            return [tensors[name] for name in sorted(names, key=lambda name: int(name.split(".")[1]))]

        self.embeddings = nn.ParameterList(parts("emb"))
        self.norm_weights, self.norm_biases = nn.ParameterList(parts("ln")), nn.ParameterList(parts("ln", "bias"))
        self.projections = nn.ModuleList(map(_linear, parts("proj")))
        self.heads = nn.ModuleList(map(_linear, parts("head")))
        self.vocab_size, inner = self.embeddings[0].shape
        self.hidden_size = self.weight.shape[1]
        self.register_buffer("vocabulary", torch.arange(self.vocab_size), persistent=False)
        state_weight = 0.5 ** (0.5 / guesses)
        self.token_weight = ((1 - state_weight**2) * inner / 2) ** 0.5 / state_weight

    @property
    def weight(self) -> Any:
        return self.projections[0].weight

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def index_of_token(self) -> Any:
        return self.vocabulary

    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Linear)]

    def start(self, hidden: Tensor) -> Started:  # (..., H) -> (..., H)
        return (_rms(hidden) / 2**0.5 if self.scale_input else hidden,)

    def follow(self, started: Started, depth: int, path: Tensor) -> Tensor:  # -> (..., V) float32
        """The logits for the children of nodes at `depth`; `path` (..., depth + 1) are the tokens from root to node."""
        (state,) = started
        for step in range(depth + 1):
            token = F.embedding(path[..., step], _at(self.embeddings, step))  # (..., inner)
            state = _rms(_at(self.projections, step)(state) + self.token_weight * token)
            state = F.gelu(state * _at(self.norm_weights, step) + _at(self.norm_biases, step))
        return _at(self.heads, depth)(state).float()


class MlpSpeculatorDrafter:
    """The drafter. Nothing trains it here, so it is of no kind."""

    def __init__(self, heads: MlpSpeculator, name: str):
        self.heads, self.name = heads, name
        self.traits = DrafterTraits(
            heads.vocab_size, taps=(HEAD,), follows_any_tree=True, deepest=heads.settings.heads, modules=(heads,),
            remembers=False,
        )  # fmt: skip
        self.default_shape = default_tree(PRIOR, self.traits.deepest, heads.weight.device.type == "cpu")

    def open(self, request: DraftRequest) -> MedusaSession:
        return MedusaSession(self.name, self.heads, request)


def load_speculator(checkpoint: Checkpoint, target: "PreTrainedModel") -> MlpSpeculator:
    """The network in the target's dtype, on its device. Raises ValueError, in one sentence, for what does not fit."""
    vocab_size, size = linear_shape(linear_head(target))
    names, config = checkpoint.plain_names(), checkpoint.config()
    tensors = checkpoint.tensors(names.values())
    tensors = {name: tensors[full] for name, full in names.items()}
    counts = {part: max(1, sum(name.startswith(f"{part}.") for name in names)) for part in ("emb", "proj", "head")}
    guesses = max(counts.values())
    if min(counts["emb"], counts["head"]) < guesses:  # guesses share parts, and only the config counts them
        said = config.get("n_predict", config.get("num_lookahead_tokens"))
        if type(said) is not int or not 1 <= said <= 16:
            raise checkpoint.refused(f"its config says n_predict={said!r}, which is no number of guesses")
        guesses = said
    first = tensors.get("emb.0.weight", torch.empty(vocab_size, 1))
    inner = first.shape[-1] if first.ndim == 2 else 1
    shapes: dict[str, tuple[int, ...]] = {f"emb.{i}.weight": (vocab_size, inner) for i in range(counts["emb"])}
    shapes |= {f"head.{i}.weight": (vocab_size, inner) for i in range(counts["head"])}
    shapes |= {f"proj.{i}.weight": (inner, inner if i else size) for i in range(counts["proj"])}
    shapes |= {f"ln.{i}.{part}": (inner,) for i in range(counts["head"]) for part in ("weight", "bias")}
    checkpoint.check(tensors, shapes)
    scale = config.get("scale_input", False)
    network = MlpSpeculator(tensors, guesses, scale is True)
    return network.to(target.device, target.dtype).requires_grad_(False).eval()


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


def _rms(state: Tensor) -> Tensor:
    return F.rms_norm(state, state.shape[-1:], eps=EPSILON)


def _at(parts: Any, step: int) -> Any:
    """What guess `step` takes: the last one, where those behind it share it."""
    return parts[min(step, len(parts) - 1)]
