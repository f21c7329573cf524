"""Where two texts of one model part, and how close the two best tokens were there.

In lower precision a forward of many tokens rounds differently from a forward of one, so texts may part at near-ties.
The margin shows whether it was one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parting(one: list[int], other: list[int]) -> int | None:
    """The first place at which two texts differ; None where they are the same."""
    if one == other:
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@torch.no_grad()
def margin(
    model: "PreTrainedModel", text: list[int], temperature: float = 0.0, key: Tensor | None = None
) -> tuple[float, float]:
    """How far apart the scores of the two best tokens after `text` are, and the spacing of the dtype's numbers there.

    Scores are logits, or at a temperature logits / temperature + the noise of the row's stream `key` (2,)."""
    ids = torch.tensor([text], device=model.device)
    scores = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    spacing = torch.finfo(model.dtype).eps * float(scores.max().abs()) / (temperature or 1.0)
    if temperature:
        assert key is not None
        vocab = torch.arange(len(scores), device=scores.device)
        position = torch.tensor([[len(text)]], device=scores.device)
        scores = scores / temperature + noise.gumbel(key[None], position, noise.TARGET, vocab)[0, 0]
    best = scores.topk(2).values
    return float(best[0] - best[1]), spacing


@torch.no_grad()
def rounding_can_swap(
    logits: Tensor, one: int, other: int, rounding: float, scores_of: Callable[[Tensor], Tensor]
) -> tuple[bool, float]:
    """Whether two forwards whose logits (V,) are each off by at most `rounding` can choose tokens `one` and `other`,
    and how far apart the two logits are.

    `scores_of` turns logits (1, V) into what the argmax is taken of. The two tokens are pushed apart by the rounding,
    each way, so that the edge of a nucleus is judged by the rule that draws it."""
    gap = abs(float(logits[one] - logits[other]))

    def choice(winner: int, loser: int) -> int:
        pushed = logits.clone()
        pushed[winner] += rounding
        pushed[loser] -= rounding
        return int(scores_of(pushed[None])[0].argmax())

    return choice(one, other) == one and choice(other, one) == other, gap
