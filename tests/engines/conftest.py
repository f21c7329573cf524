"""A model with a drafter of every kind, ragged prompts, and tapes instead of captures."""

import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.proposal import NoDrafter

from support.models import eagle_copy, fitted_heads, noisy_copy, random_eagle, tiny_llama
from support.tape import TapeExecutor, tape_executor


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=2)


@pytest.fixture(scope="module")
def drafters(model):
    two_levels = [[0.6, 0.3], [0.6]]
    made = {"none": NoDrafter(), "ngram": NgramDrafter(), "model": ModelDrafter(noisy_copy(model), rates=two_levels)}
    for mode in ("independent", "markov", "hydra"):
        made[mode] = MedusaDrafter(fitted_heads(model, mode, known=40))
    made["beside"] = Beside(made["hydra"], made["ngram"])
    made["eagle"] = EagleDrafter(eagle_copy(model, known=torch.arange(2, 58)), rates=two_levels)
    wide = dict(wide=True, taps=(0, 1, "head"), tap_norms=True, norm_output=True, known=torch.arange(3, 50))
    made["eagle beside"] = Beside(EagleDrafter(random_eagle(model, **wide), rates=two_levels), made["ngram"])
    return made


@pytest.fixture(scope="module")
def prompts():
    """Three batches of two ragged rows."""
    torch.manual_seed(5)
    batches = []
    for width, pad in ((9, 3), (6, 0), (14, 9)):
        ids, mask = torch.randint(5, 61, (2, width)), torch.ones(2, width, dtype=torch.long)
        ids[0, width // 2 :] = ids[0, : width - width // 2].clone()
        mask[1, :pad] = 0
        batches.append((ids * mask, mask))
    return batches


@pytest.fixture
def tapes(monkeypatch):
    with tape_executor(monkeypatch) as made:
        yield made
    TapeExecutor.made.clear()
