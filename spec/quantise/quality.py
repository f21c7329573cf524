"""How far a quantised model is from its original: measured on held-out texts, position by position.

At each position that counts, both models have read the same text (teacher forcing); what is compared is what they would
say next. Knows nothing of quantisation.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..noise import TARGET, gumbel, row_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text to measure on: predictions of its tokens from number `begin` on count."""

    tokens: list[int]
    begin: int  # at least 1


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over all positions that count."""

    positions: int
    kl: float  # KL(original || model), nats
    greedy: float  # share of positions where the most probable token is the same
    coupled: float  # share where both draw the same token at temperature 1 with the same noise
    perplexity: float  # of the texts' own tokens

    def record(self) -> dict:
        return asdict(self)


@torch.no_grad()
def logits_on(model: "PreTrainedModel", texts: Iterable[HeldOut]) -> list[Tensor]:
    """The logits (n, V) at each text's positions that count, in the model's dtype."""
    made = []
    for text in texts:
        ids = torch.tensor([text.tokens], device=model.device)
        made.append(model(input_ids=ids, use_cache=False).logits[0, text.begin - 1 : -1].to(model.dtype, copy=True))
    return made


def compare(original: list[Tensor], model: list[Tensor], texts: list[HeldOut]) -> Quality:
    """The quality of a model with logits `model`, against `original`, both as by `logits_on` on `texts`."""
    divergence = surprise = 0.0
    greedy = coupled = positions = 0
    for row, (theirs, mine, text) in enumerate(zip(original, model, texts)):
        theirs, mine = theirs.float().log_softmax(-1), mine.float().log_softmax(-1)  # (n, V)
        said = torch.tensor(text.tokens[text.begin :], device=mine.device)
        noise = _noise(row, text, mine)
        positions += len(said)
        divergence += float((theirs.exp() * (theirs - mine)).sum())
        surprise -= float(mine.gather(1, said[:, None]).sum())
        greedy += int((theirs.argmax(-1) == mine.argmax(-1)).sum())
        coupled += int(((theirs + noise).argmax(-1) == (mine + noise).argmax(-1)).sum())
    perplexity = math.exp(surprise / positions)
    return Quality(positions, divergence / positions, greedy / positions, coupled / positions, perplexity)


def _noise(row: int, text: HeldOut, like: Tensor) -> Tensor:  # (n, V)
    """The noise that decoding draws these tokens with, for stream (0, row)."""
    keys = row_keys(0, row + 1, like.device)[row:]  # (1, 2)
    places = torch.arange(text.begin, len(text.tokens), device=like.device)[None]  # (1, n)
    return gumbel(keys, places, TARGET, torch.arange(like.shape[-1], device=like.device))[0]
