"""Drafters for any target that need neither training nor download, for checks: with them too the output must be the
target's own, and a step costs as much as with a trained drafter of the same kind.

    ngram        prompt lookup
    draft model  the target itself with noise on its weights, whose drafts are sometimes accepted
    medusa       independent heads with random weights
    hydra        sequential heads with random weights
"""

import copy
from typing import TYPE_CHECKING

import torch

from ..spec.proposal import Drafter
from .draft_model import ModelDrafter
from .head_settings import HeadSettings, Mode
from .medusa import MedusaDrafter, MedusaHeads
from .ngram import NgramDrafter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("ngram", "draft model", "medusa", "hydra")
_MODES: dict[str, Mode] = {"medusa": "independent", "hydra": "hydra"}
NOISE = 0.05  # relative to a weight's standard deviation
_BLOCK = 1_048_573  # how many random numbers are drawn and then repeated; a prime


def untrained(kind: str, target: "PreTrainedModel") -> Drafter:
    """A drafter of one of `KINDS` for the model `target`; "draft model" takes as much memory as the target."""
    if kind == "ngram":
        return NgramDrafter()
    if kind == "draft model":
        return ModelDrafter(_noisy_copy(target), kind)
    heads = MedusaHeads.make(HeadSettings(_MODES[kind]), target).to(target.dtype)
    for parameter in heads.parameters():
        _add_noise(parameter, 0.1 * heads.hidden_size**-0.5)
    return MedusaDrafter(heads.requires_grad_(False).eval(), kind)


@torch.no_grad()
def _noisy_copy(target: "PreTrainedModel") -> "PreTrainedModel":
    model = copy.deepcopy(target)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            _add_noise(parameter, NOISE * float(parameter[0].float().std()))
    return model


@torch.no_grad()
def _add_noise(parameter: torch.Tensor, spread: float) -> None:
    """Add normal noise. One block is drawn and repeated: drawing billions of numbers would take minutes on a CPU."""
    generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
    block = spread * torch.randn(_BLOCK, generator=generator, device=parameter.device)
    flat, block = parameter.view(-1), block.to(parameter.dtype)
    for start in range(0, flat.numel(), len(block)):
        flat[start : start + len(block)].add_(block[: flat.numel() - start])
