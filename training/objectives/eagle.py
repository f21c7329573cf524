"""The objective of EAGLE networks, with the target frozen.

The network is unrolled over the text as decoding would feed it (eagle_unroll.py): `steps` deep, each step on the
features that the one before fed back. Step i is judged against the target's law, or the text, with weight `decay`**i;
the gradient flows through all steps. Works in chunks of positions, so that no (tokens, vocabulary) tensor is larger
than a chunk, and the target's law at a position is computed once for all steps. Knows no trainer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafters.eagle.drafter import EagleDrafter
from ...drafters.eagle.folder import save_network
from ...drafters.eagle.network import EagleNetwork
from ...spec.target.taps import HEAD
from ..config import read
from .eagle_start import make_network
from .eagle_unroll import Text, unroll
from .known_tokens import of_known
from .losses import SOFT, SoftCrossEntropy, Summed, check_mixture
from .objective import NO_LABEL, Batch, Judge, Losses, Objective, TargetView, labelled
from .target import OnlineTarget


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The section `objective` of a configuration."""

    kind: Literal["eagle"] = "eagle"
    layout: Literal["joined", "eagle1", "wide"] = "joined"  # our own, EAGLE-1's, or EAGLE-3's
    parts: dict[str, Any] = field(default_factory=dict)  # of `EagleSettings`, where they differ from the layout's
    taps: list[Any] | None = None  # layers of the target, from 0, or 'head'; None: the last hidden state, wide 3 layers
    layers: int = 1
    layer: dict[str, Any] = field(default_factory=dict)  # of a layer's Hugging Face config, where not the target's
    layer_of_target: int | None = None  # the layers begin as this one of the target, and the next
    start: str | None = None  # an earlier drafter of the same settings to go on from
    known_tokens: int | None = None  # so many of the commonest in the data; None is all, or those of the start
    losses: dict[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})  # and cross_entropy, see losses.py
    feature_weight: float = 0.0  # of the smooth L1 distance to the target's own next feature
    steps: int = 3
    decay: float = 0.8
    depths: int = 4  # levels to report
    chunk: int = 256  # positions whose logits are held at once


class EagleObjective(Objective):
    """Raises ValueError for settings that do not fit one another."""

    def __init__(self, network: EagleNetwork, settings: Settings):
        super().__init__()
        self.network, self.settings = network, settings
        self.losses, self.steps, self.depths = check_mixture(settings.losses), settings.steps, settings.depths
        for name, least in (("steps", 1), ("depths", 1), ("chunk", 1), ("feature_weight", 0)):
            if not getattr(settings, name) >= least:
                raise ValueError(f"objective.{name} is {getattr(settings, name)}; it must be at least {least}")
        if not 0 < settings.decay <= 1:
            raise ValueError(f"objective.decay is {settings.decay}; it must be above 0 and at most 1")
        if unfit := self.losses.keys() - SOFT:
            raise ValueError(f"objective.losses has {min(unfit)}; EAGLE is trained by {' and '.join(SOFT)}")
        if settings.feature_weight and not isinstance(network.fuse, nn.Identity):
            raise ValueError(
                "objective.feature_weight compares what is fed back with the target's own features, and these are "
                "fused here; set it to 0"
            )
        self.taps = tuple(dict.fromkeys((*network.settings.taps, HEAD)))
        self._law: tuple[nn.Module, ...] = ()  # a tuple, so that torch does not register it as a submodule

    @classmethod
    def build(cls, settings: dict, target, rows: Iterable[dict] = ()) -> "EagleObjective":
        given = read(Settings, settings, "objective")
        return cls(make_network(given, target, rows), given)

    @classmethod
    def judge(cls, drafter: EagleDrafter, model, depths: int) -> Judge:
        network = drafter.network
        target = OnlineTarget(model, tuple(dict.fromkeys((*network.settings.taps, HEAD))))

        def ranks(batch: Batch) -> tuple[Tensor, Tensor]:
            return text_ranks(network, batch, target.view(batch, "", []), depths), labelled(batch, 1)[..., 0]

        return ranks

    def forward(self, batch: Batch, seen: TargetView) -> Losses:
        """In evaluation it goes as deep as it reports. Labels that the network does not know count as misses."""
        steps = self.steps if self.training else max(self.steps, self.depths)
        text = Text.of(batch, seen, self.network.settings.taps, max(steps, self.depths))
        columns = text.columns()
        if not len(columns):
            return self._nothing()
        unrolled = list(unroll(self.network, text, columns, steps))
        total, right = self._losses_of([states for states, _ in unrolled], text, columns, seen.lm_head)
        if self.settings.feature_weight:
            distances = self._feature_losses([fed for _, fed in unrolled[: self.steps]], text, columns)
            total = total + self.settings.feature_weight * distances
        judged = text.judged[columns, : self.depths]  # (C, depths)
        right = F.pad(right, (0, max(0, self.depths - steps)))[:, : self.depths]
        reached = F.pad(right.cumprod(1), (1, 0), value=1)[:, : self.depths].bool() & judged
        if steps < self.depths:
            reached[:, steps:] = False  # not drafted
        return Losses(total, text.judged[:, 0].sum(), (reached & right).sum(0), reached.sum(0))

    @torch.no_grad()
    def label_ranks(self, batch: Batch, seen: TargetView) -> Tensor:
        return text_ranks(self.network, batch, seen, self.depths, self.settings.chunk)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`layers`, `join` (and `fuse`: what reads the target's states), `norms` outside of the layers, and where they
        are its own `head` and `embeddings`."""
        names = {"layers": "layers", "join": "join", "fuse": "join", "lm_head": "head", "embeddings": "embeddings"}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(names.get(name.split(".")[0], "norms"), []).append(parameter)
        return groups

    def save(self, folder: Path) -> None:
        save_network(self.network, folder)

    def _losses_of(self, states: list[Tensor], text: Text, columns: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
        """The weighted loss of all steps' states (C, H), and of each column and step whether its first guess was right,
        (C, steps). Goes through the text by the position at which the target has the same law for all steps."""
        steps, count = len(states), len(text.ids)
        ahead = torch.arange(1, steps + 1, device=columns.device)  # step i of column t is for the law at t + 1 + i
        judged = text.judged[:, :steps]
        start = torch.arange(count, device=columns.device)[:, None] - ahead  # (N, steps): the column at each position
        counted = judged.gather(0, start.clamp(min=0)) & (start >= 0)
        at = counted.any(1).nonzero()[:, 0]  # (P,): positions with a law to be learnt
        number = (judged[:, 0].cumsum(0) - 1)[start[at].clamp(min=0)].clamp(min=0)  # (P, steps) of the columns
        placed = torch.stack([part[number[:, step]] for step, part in enumerate(states)], 1)  # (P, steps, H)
        labels = self.network.index_of_token[text.ids[at + 1]]  # (P,): V' for unknown ones
        weights = counted[at] * self.settings.decay ** (ahead - 1) * (ahead <= self.steps)  # (P, steps)
        right = torch.zeros_like(counted)  # (N, steps)
        law, lm_head = self._law_of(head, text.hidden.dtype), self.network.lm_head

        def loss_of(part: slice, states: Tensor) -> tuple[Tensor]:  # (n, steps, H)
            label, weight = labels[part], weights[part]
            distribution, total = self._wanted(law, text.hidden[at[part]], label, weight.sum(1))
            for step in range(steps):
                logits = lm_head(states[:, step])  # (n, V')
                loss, top = SoftCrossEntropy.apply(logits, distribution * weight[:, step, None].to(logits.dtype))
                total = total + loss
                right[at[part] - 1 - step, step] = (top == label) & counted[at[part], step]
            return (total,)

        parts = ((slice(start, start + self.settings.chunk),) for start in range(0, len(at), self.settings.chunk))
        own = [parameter for parameter in lm_head.parameters() if parameter.requires_grad]
        zeros = [placed.new_zeros((), dtype=torch.promote_types(placed.dtype, torch.float32))]
        (total,) = Summed.apply(loss_of, parts, zeros, placed, *own)
        return total, right[columns]

    @torch.no_grad()
    def _wanted(self, law: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the network should say at n positions, (n, V') that sums to the weights of the losses; and minus the
        weighted entropy of the target's law, which makes of its cross-entropy the KL divergence."""
        divergence, entropy = self.losses.get("forward_kl", 0.0), weights.new_zeros(())
        logits = law(hidden)  # (n, V')
        wanted = logits.softmax(-1) * divergence
        if divergence:
            entropy = SoftCrossEntropy.apply(logits, wanted * weights[:, None].to(wanted.dtype))[0]
        known = labels < logits.shape[1]
        hard = self.losses.get("cross_entropy", 0.0) * known[:, None].to(wanted.dtype)
        return wanted.scatter_add(1, labels[:, None].clamp(max=logits.shape[1] - 1), hard), -entropy

    def _feature_losses(self, fed: list[Tensor], text: Text, columns: Tensor) -> Tensor:
        total = fed[0].new_zeros((), dtype=torch.promote_types(fed[0].dtype, torch.float32))
        for step, features in enumerate(fed):
            judged = text.judged[columns, step]
            with torch.no_grad():
                wanted = self.network.fused(text.features[columns[judged] + step + 1].to(total.dtype))
            distance = F.smooth_l1_loss(features[judged].to(total.dtype), wanted, reduction="none").mean(-1).sum()
            total = total + self.settings.decay**step * distance
        return total

    def _law_of(self, head: nn.Module, dtype: torch.dtype) -> nn.Module:
        """From the target's last hidden states, in `dtype`, to logits of the known tokens."""
        if not self._law:
            self._law = (of_known(head, self.network.vocabulary, dtype),)
        return self._law[0]

    def _nothing(self) -> Losses:
        """The losses of a batch without labels, in which every trained parameter still takes part."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        zeros = torch.zeros(self.depths, dtype=torch.int64, device=trained[0].device)
        return Losses(sum(parameter.sum() * 0.0 for parameter in trained), zeros.sum(), zeros, zeros)


@torch.no_grad()
def text_ranks(network: EagleNetwork, batch: Batch, seen: TargetView, depths: int, chunk: int = 256) -> Tensor:
    """`Objective.label_ranks` of a network: (n, depths), ties in the order of ids."""
    text, known = Text.of(batch, seen, network.settings.taps, depths), len(network.vocabulary)
    columns, head = text.columns(), network.lm_head
    at = torch.full((len(columns), depths), NO_LABEL, device=columns.device)
    order = torch.arange(known, device=columns.device)
    for depth, (states, _) in enumerate(unroll(network, text, columns, depths) if len(columns) else ()):
        judged = text.judged[columns, depth]
        labels = network.index_of_token[text.ids[columns[judged] + depth + 2], None]  # (n, 1)
        ranks = []
        for part, label in zip(states[judged].split(chunk), labels.split(chunk)):
            logits = head(part)  # (n, V')
            picked = logits.gather(1, label.clamp(max=known - 1))
            before = ((logits > picked) | ((logits == picked) & (order < label))).sum(-1)
            ranks.append(torch.where(label[:, 0] < known, before, network.vocab_size))
        if ranks:
            at[judged, depth] = torch.cat(ranks)
    return at
