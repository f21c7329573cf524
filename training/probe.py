"""How fast heads train on this machine with the target online: a few steps of the trainer on random tokens.

For `paceline check`, which has no data. Writes nothing but a temporary folder.
"""

import math
import tempfile

import torch
from accelerate import Accelerator
from torch import Tensor

from . import config as configuration
from .objectives.heads import MedusaObjective
from .objectives.target import OnlineTarget
from .trainer import Trainer

KNOWN_TOKENS = 8192  # as in the recipes for heads
SIZES = {"cpu": (1, 128), "cuda": (4, 1024)}  # rows of a step and tokens of a row


class RandomRows:
    """Stands in for `data.rows.Rows`: each row is one document of random tokens, all of which count in the loss."""

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def __len__(self) -> int:
        return 1 << 16

    def batch(self, rows: list[int], device="cpu") -> dict[str, Tensor]:
        drawn = [torch.randint(self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(row))
                 for row in rows]  # fmt: skip
        ids = torch.stack(drawn).to(device)
        ones = torch.ones_like(ids)
        return {"input_ids": ids, "loss_mask": ones, "document": ones * 0, "position_ids": ones.cumsum(1) - 1}


def heads_speed(model, steps: int) -> tuple[float, float]:
    """Tokens per second of training independent heads for `steps` steps (the first not timed), and the last loss.

    Raises ValueError where the loss is not a finite number."""
    device = model.device
    rows, length = SIZES["cpu" if device.type == "cpu" else "cuda"]
    vocabulary = model.config.get_text_config().vocab_size
    known = min(KNOWN_TOKENS, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "objective": {"known_tokens": known}, "data": {"folder": folder}, "run": {"folder": folder},
            "optimisation": {"batch": rows, "micro_batch": rows},
        }  # fmt: skip
        config = configuration.read(configuration.Config, settings)
        splits = {"train": RandomRows(vocabulary, length)}
        common = [{"input_ids": list(range(known)), "loss_mask": [1] * known}]
        objective = MedusaObjective.build(config.objective, model, common)
        accelerator = Accelerator(cpu=device.type == "cpu")
        trainer = Trainer(config, accelerator, objective, OnlineTarget(model), splits, {}, {})
        speed, loss = trainer.measure(steps, learn=True)
    if not math.isfinite(loss):
        raise ValueError(f"the loss of heads in training is {loss}; check the model's weights and dtype")
    return speed, loss
