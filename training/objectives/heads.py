"""The objective of Medusa heads, for all three modes, with the target frozen (Medusa-1, arXiv:2401.10774).

The loss of a head is a weighted sum of cross-entropy with the text and KL divergence from the target's distribution at
that position; heads further ahead have less weight. Heads that read earlier drafted tokens are given the text's tokens.
Works in chunks of positions and computes the gradients of each at once, so that no (tokens, vocabulary) tensor is
larger than a chunk. Knows no trainer.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafters.folder import origin_of
from ...drafters.head_settings import HeadSettings
from ...drafters.medusa import MedusaDrafter, MedusaHeads
from ...spec.target.taps import HEAD, linear_head
from ...spec.target.weights import dense_rows, dense_weight, linear_shape
from ..config import read
from .known_tokens import frequent_tokens
from .losses import Summed
from .objective import NO_LABEL, Batch, Judge, Losses, Objective, TargetView, labelled, windows
from .start import start_folder
from .target import OnlineTarget, ScaledHead

_CHUNK = 1 << 23  # logits computed at a time; twice as many no longer fit in a CPU's cache


@dataclass(frozen=True, kw_only=True)
class Settings(HeadSettings):
    """The section `objective` of a configuration: the heads, which tokens they know, and how they are judged."""

    kind: Literal["medusa"] = "medusa"
    start: str | None = None  # heads of the same settings to go on from, such as those of the target's base model
    known_tokens: int | None = None  # so many of the commonest in the data; None is all, or those of the start
    label_weight: float = 1.0
    target_weight: float = 0.0
    decay: float = 0.8


class MedusaObjective(Objective):
    """`label_weight` weighs the cross-entropy against the text, `target_weight` the KL divergence from the target's
    law over the tokens that the heads know, head k both by `decay`**k.

    Labels that the heads do not know count as misses and have no cross-entropy. Raises ValueError for weights that
    are negative or all zero."""

    taps = (HEAD,)

    def __init__(self, heads: MedusaHeads, label_weight: float = 1.0, target_weight: float = 0.0, decay: float = 0.8):
        super().__init__()
        if min(label_weight, target_weight) < 0 or label_weight + target_weight <= 0:
            raise ValueError(
                f"label_weight={label_weight} and target_weight={target_weight} must not be negative, nor both zero"
            )
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} must be above 0 and at most 1")
        self.heads = heads.float().requires_grad_(True)
        self.depths = heads.settings.heads
        self.label_weight, self.target_weight, self.decay = label_weight, target_weight, decay

    @classmethod
    def build(cls, settings: dict, target, rows: Iterable[dict] = ()) -> "MedusaObjective":
        """The objective that the `objective` section of a configuration describes, untrained or from its `start`, on
        the target's device. `rows` of training data say which tokens are common. Raises ValueError for settings that
        make none."""
        given = read(Settings, settings, "objective")
        if given.start is not None:
            return cls(_from_start(given, target), given.label_weight, given.target_weight, given.decay)
        size, vocabulary = target.config.get_text_config().vocab_size, None
        if given.known_tokens is not None:
            vocabulary = frequent_tokens(rows, given.known_tokens, size)
        heads = HeadSettings(**{name: getattr(given, name) for name in HeadSettings.__dataclass_fields__})
        made = MedusaHeads.make(heads, target, vocabulary)
        return cls(made, given.label_weight, given.target_weight, given.decay)

    @classmethod
    def judge(cls, drafter: MedusaDrafter, model, depths: int) -> Judge:
        heads, target = drafter.heads, OnlineTarget(model)
        objective = cls(copy.deepcopy(heads)).to(heads.dtype).eval()  # which makes them float32 first

        def ranks(batch: Batch) -> tuple[Tensor, Tensor]:
            return objective.label_ranks(batch, target.view(batch, "", [])), labelled(batch, 1)[..., 0]

        return ranks

    def forward(self, batch: Batch, seen: TargetView) -> Losses:
        """Needs `seen.hidden` (B, T, H) of the whole batch."""
        device, laws = seen.hidden.device, self._law_of(seen) if self.target_weight else None
        zeros = [torch.zeros((), device=device)]
        zeros += [torch.zeros(size, dtype=torch.int64, device=device) for size in ((), self.depths, self.depths)]
        chunks = ((*chunk, laws) for chunk in self._chunks(batch, seen))
        return Losses(*Summed.apply(self._chunk_losses, chunks, zeros, None, *self.parameters()))

    @torch.no_grad()
    def label_ranks(self, batch: Batch, seen: TargetView) -> Tensor:
        ranks = [torch.zeros(0, self.depths, dtype=torch.int64, device=seen.hidden.device)]
        for hidden, path, judged in self._chunks(batch, seen):
            ranks.append(torch.where(judged, self._chunk_ranks(hidden[:, 0], path), NO_LABEL))
        return torch.cat(ranks)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`blocks`, and where there are any `lm_heads` (own LM heads), `markov` and `path`."""
        names = {"head_weight": "lm_heads", "previous": "markov", "following": "markov", "path_weight": "path"}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.heads.named_parameters():
            groups.setdefault(names.get(name, "blocks"), []).append(parameter)
        return groups

    def save(self, folder: Path) -> None:
        self.heads.save(folder)

    def _chunks(self, batch: Batch, seen: TargetView):
        """Chunks of n positions t that have labels: states h_t, h_{t+1}, ... (n, K + 1, H), without KL only h_t
        (n, 1, H); tokens x_{t+1}, x_{t+2}, ... (n, K + 1); and which of the last K tokens are judged (n, K)."""
        judged = labelled(batch, self.depths).flatten(0, 1)  # (B * T, K)
        paths = windows(batch["input_ids"].long(), self.depths + 1, 0).flatten(0, 1)  # (B * T, K + 1)
        states = seen.hidden.flatten(0, 1)  # (B * T, H)
        ahead = torch.arange(self.depths + 1 if self.target_weight else 1, device=states.device)
        most = max(1, _CHUNK // (self.depths * len(self.heads.vocabulary)))
        for positions in judged[:, 0].nonzero()[:, 0].split(most):
            reach = (positions[:, None] + ahead).clamp(max=len(states) - 1)  # beyond a row only where nothing is judged
            yield states[reach].to(self.heads.dtype), paths[positions], judged[positions]

    def _chunk_losses(self, states: Tensor, path: Tensor, judged: Tensor, laws) -> tuple[Tensor, ...]:
        """total, counted, hits and tried of n positions."""
        started = self.heads.start(states[:, 0])
        total, counted, hits, tried = states.new_zeros(()), 0, [], []
        right = judged[:, 0]
        for depth in range(self.depths):
            logits = self.heads.follow(started, depth, path[:, : depth + 1])  # (n, V') float32
            label = self.heads.index_of_token[path[:, depth + 1]]  # (n,), V' where the heads do not know the token
            known = judged[:, depth] & (label < logits.shape[1])
            log_probs = logits.log_softmax(-1)
            picked = log_probs.gather(1, label[:, None].clamp(max=logits.shape[1] - 1))[:, 0]
            loss = -self.label_weight * torch.where(known, picked, 0.0)
            if laws is not None:
                with torch.no_grad():
                    law = laws(states[:, depth + 1])  # (n, V') log-probabilities
                divergence = F.kl_div(log_probs, law, reduction="none", log_target=True).sum(-1)
                loss = loss + self.target_weight * torch.where(judged[:, depth], divergence, 0.0)
            total = total + self.decay ** (depth + 1) * loss.sum()
            counted = counted + (known if laws is None else judged[:, depth]).sum()
            tried.append((right & judged[:, depth]).sum())
            right = right & judged[:, depth] & (logits.argmax(-1) == label)
            hits.append(right.sum())
        return total, counted, torch.stack(hits), torch.stack(tried)

    def _chunk_ranks(self, hidden: Tensor, path: Tensor) -> Tensor:
        """The rank of each label, (n, K); V for labels that the heads do not know, ties in the order of ids."""
        started, ranks = self.heads.start(hidden), []
        for depth in range(self.depths):
            logits = self.heads.follow(started, depth, path[:, : depth + 1])
            known = logits.shape[1]
            label = self.heads.index_of_token[path[:, depth + 1], None]  # (n, 1)
            label_logit = logits.gather(1, label.clamp(max=known - 1))
            earlier = torch.arange(known, device=logits.device) < label
            before = ((logits > label_logit) | ((logits == label_logit) & earlier)).sum(-1)
            ranks.append(torch.where(label[:, 0] < known, before, self.heads.vocab_size))
        return torch.stack(ranks, dim=1)

    def _law_of(self, seen: TargetView):
        """A function from states (n, H) to the target's log-probabilities over the known tokens (n, V')."""
        head, ids = seen.lm_head, self.heads.vocabulary
        scaled = head.scaled if isinstance(head, ScaledHead) else nn.Identity()
        linear = head.linear if isinstance(head, ScaledHead) else head
        weight = dense_rows(linear, ids) if self.heads.trimmed else dense_weight(linear)
        weight, bias = weight.to(self.heads.dtype), self.heads.head_bias
        return lambda states: scaled(F.linear(states, weight, bias)).float().log_softmax(-1)


def _from_start(settings: Settings, target) -> MedusaHeads:
    """The heads called `settings.start`, which may be another target's. Raises ValueError where they are of another
    shape than settings and target ask for."""
    folder = start_folder(settings.start)
    if folder is None or folder.kind != "medusa":
        raise ValueError(f"objective.start {settings.start} holds no heads; give the folder or name of trained heads")
    config, (vocab_size, hidden_size) = folder.config, linear_shape(linear_head(target))
    for name, size in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
        if config.get(name) != size:
            raise ValueError(
                f"objective.start {settings.start} is for a target of {name} {config.get(name)} and this one's is "
                f"{size}; start from heads of the same base model"
            )
    known = config.get("known_tokens") if settings.known_tokens is None else settings.known_tokens
    for name in (*HeadSettings.__dataclass_fields__, "known_tokens"):
        asked = known if name == "known_tokens" else getattr(settings, name)
        if config.get(name) != asked:
            raise ValueError(
                f"objective.{name} is {asked} and {config.get(name)} in {settings.start}, its start; set it to that"
            )
    heads = MedusaHeads.load(folder, target)
    heads.origin = origin_of(folder)
    return heads
