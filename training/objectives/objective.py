"""The interface between a kind of drafter and the trainer: its network, its loss, its label ranks.

A batch is rows of packed documents (B, T): `input_ids`, `loss_mask` (1 where the token is the target's own text),
`position_ids`, `document` (-1 on padding). Knows no trainer, optimiser or file of data.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...spec.plan.trees import Acceptance
from ...spec.target.taps import HEAD, Tap

Batch = dict[str, Tensor]
# From a batch to label ranks (n, D) and the mask (B, T) whose n True positions they belong to.
Judge = Callable[[Batch], tuple[Tensor, Tensor]]
NO_LABEL = -1


class Losses(NamedTuple):
    """Loss and statistics of a batch. A tuple, because FSDP2 of torch 2.10 finds no tensors in dataclasses."""

    total: Tensor  # scalar, summed over counted labels, differentiable
    counted: Tensor  # scalar: the number of these labels
    hits: Tensor  # (depths,): of `tried`, how often the first guess was right
    tried: Tensor  # (depths,): labels whose path so far had been guessed right

    def tokens_per_step(self) -> float:
        """Estimated tokens per step with a chain of first guesses: 1 + sum_d prod_{i<=d} hits_i / tried_i."""
        rates = self.hits.double() / self.tried.double().clamp(min=1)
        return 1 + float(rates.cumprod(0).sum())


@dataclass(slots=True, eq=False)
class TargetView:
    """The frozen target's hidden states on a batch, without gradient, and its LM head."""

    tapped: dict[Tap, Tensor]  # (B, T, H) for each tap of the objective
    lm_head: nn.Module  # linear, to get logits chunk by chunk

    @property
    def hidden(self) -> Tensor:
        """The LM head's input, (B, T, H)."""
        return self.tapped[HEAD]


class Objective(nn.Module, ABC):
    """A drafter's network with its loss: the module that the trainer wraps, calls and saves."""

    depths: int  # how many per-depth statistics it gives
    taps: tuple[Tap, ...]  # the hidden states that it reads of the target

    @classmethod
    @abstractmethod
    def build(cls, settings: dict, target, rows: Iterable[dict] = ()) -> "Objective":
        """The objective that the `objective` section of a configuration describes, on the target's device; `rows` of
        training data say which tokens are common. Raises ValueError for settings that make none."""

    @classmethod
    def judge(cls, drafter, model, depths: int) -> Judge | None:
        """A function that computes label ranks of `drafter`, one of this kind, for the target `model`, in decoding's
        dtype and to `depths` or as many as the drafter has. None where only decoding can evaluate it."""
        return None

    @abstractmethod
    def forward(self, batch: Batch, seen: TargetView | None) -> Losses:
        """The loss of a batch, every trainable parameter taking part in `total`."""

    @abstractmethod
    def label_ranks(self, batch: Batch, seen: TargetView | None) -> Tensor:
        """For each of the n positions with labels, the number of tokens that the drafter holds more likely than the
        text's token, given the text before: (n, depths). NO_LABEL where a depth has no label; the size of the target's
        vocabulary for tokens that the drafter never proposes."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters under names that may have learning rates of their own."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a complete drafter folder."""


def windows(values: Tensor, length: int, fill: int) -> Tensor:  # (B, T) -> (B, T, length)
    """The `length` values after each position, `fill` past the end."""
    return nn.functional.pad(values, (0, length), value=fill)[:, 1:].unfold(1, length, 1)


def labelled(batch: Batch, depths: int) -> Tensor:  # (B, T, depths) bool
    """Which guesses are judged: depth d of position t is the guess of token t + 2 + d, where tokens t + 2 to
    t + 2 + d are all the target's own and everything from t on is of one document.

    Token t + 1 is the root, which decoding has committed already; so the first answer token of a turn is guessed
    from the last token but one of the prompt, and no prompt token ever is."""
    document = batch["document"]
    same = (windows(document, depths + 1, -1) == document[..., None]) & (document >= 0)[..., None]
    counted = windows(batch["loss_mask"].bool(), depths + 1, 0) & same
    return counted[..., 1:].cumprod(-1).bool() & same[..., :1]


@torch.no_grad()
def acceptance(objective: Objective, seen: Iterable[tuple[Batch, TargetView | None]], width: int) -> Acceptance:
    """Teacher-forced acceptance over pairs of batch and view."""
    return count_ranks((objective.label_ranks(batch, view) for batch, view in seen), objective.depths, width)


def count_ranks(label_ranks: Iterable[Tensor], depths: int, width: int) -> Acceptance:
    """Teacher-forced acceptance from label ranks (n, depths) each: p[depth][rank] with its counts, for the planner.

    p[d][r] is the share of trials in which the text's token had rank r at depth d; a trial needs all earlier tokens of
    the path to be within the best `width`. Sampling accepts differently: these are plain ranks, without noise."""
    hits = torch.zeros(depths, width, dtype=torch.int64)
    trials = torch.zeros(depths, 1, dtype=torch.int64)
    for ranks in label_ranks:
        ranks = ranks.cpu()
        judged = ranks != NO_LABEL
        within = judged & (ranks < width)
        reached = torch.ones_like(within[:, 0])
        for depth in range(depths):
            trials[depth] += (reached & judged[:, depth]).sum()
            reached = reached & within[:, depth]
            hits[depth] += ranks[reached, depth].bincount(minlength=width)
    return Acceptance(hits.tolist(), trials.expand(-1, width).tolist())
