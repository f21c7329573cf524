"""Small draft models that are trained."""

from paceline.training.objectives.draft_lm import DraftObjective

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def build(model, **settings):
    return DraftObjective.build({"kind": "draft_lm", **settings}, model)
