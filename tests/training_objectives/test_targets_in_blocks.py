"""Drafters are trained for a target in blocks as for the dense model with the same numbers."""

import pytest
import torch
from paceline.drafters.complete import complete
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaHeads
from paceline.training.objectives.draft_lm import DraftObjective
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.target import OnlineTarget

from support.blocks import dense_copy, in_blocks
from support.draft_lms import SIZES

LOSSES = {"forward_kl": 1.0}


@pytest.fixture
def pair(model):
    blocks = in_blocks(model)
    return dense_copy(model, blocks), blocks


def loss(objective, target, batch):
    with torch.no_grad():
        return objective(batch, OnlineTarget(target).view(batch, "train", [0, 1, 2])).total


@pytest.mark.parametrize("known", [None, 12])
@pytest.mark.parametrize("mode", ["independent", "hydra"])
def test_heads(pair, batch, mode, known):
    totals = []
    for target in pair:
        torch.manual_seed(0)
        ids = None if known is None else torch.arange(3, 3 + known)
        heads = MedusaHeads.make(HeadSettings(mode, heads=2), target, ids)
        totals.append(loss(MedusaObjective(heads, 1.0, 0.5), target, batch))
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)


CASES = {
    "layers of the target": {"layers": [1], "embeddings": "target", "head": "target"},
    "own layers": {"sizes": SIZES},
    "the target's head": {"layers": [1], "head": "target"},
    "known tokens": {"layers": [1], "embeddings": "target", "head": "target", "known_tokens": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_draft_models(pair, batch, case, tmp_path):
    rows = [{name: batch[name][row] for name in ("input_ids", "loss_mask")} for row in range(3)]
    totals, made = [], []
    for target in pair:
        torch.manual_seed(0)
        settings = {**CASES[case], "losses": LOSSES, "save": {"without_target_weights": "head" in CASES[case]}}
        objective = DraftObjective.build({"kind": "draft_lm", **settings}, target, rows)
        totals.append(loss(objective, target, batch))
        made.append(objective)
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4)
    if case == "layers of the target":
        made[1].save(tmp_path / "draft")
        theirs = complete(tmp_path / "draft", pair[1])
        ids = batch["input_ids"][:1]
        with torch.no_grad():
            truth = made[1].model.eval()(ids).logits
            assert (theirs(ids).logits - truth).abs().max() < 0.2 * truth.std(), "kept in bfloat16"
