"""The plan of a training run: tokens, steps, epochs, time and disk space. Printed before training."""

import math
from dataclasses import dataclass

from torch import nn

from .config import Config
from .data.rows import Rows


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    trained: int  # parameters that are trained
    trained_vocabulary: int  # of these, embeddings and LM heads
    frozen: int
    tokens: int
    steps: int
    epochs: float
    tokens_per_second: float | None  # None: not measured
    checkpoint_bytes: int  # of all checkpoints that exist at the same time
    hidden_bytes: int  # of the target's hidden states on disk; 0 where the target runs during training

    def show(self) -> str:
        body = self.trained - self.trained_vocabulary
        lines = [
            f"parameters   {_count(self.trained)} trained, {_count(body)} without embeddings and LM head; "
            f"{_count(self.frozen)} frozen",
            f"tokens       {_count(self.tokens)}, {self.tokens / self.trained:.3g} for each trained parameter "
            "(Chinchilla: 20)",
            f"steps        {self.steps:,}, {self.epochs:.2f} times over the data",
            f"checkpoints  {_bytes(self.checkpoint_bytes)} at most",
        ]
        if self.hidden_bytes:
            lines.append(f"hidden       {_bytes(self.hidden_bytes)} of the target's hidden states on disk")
        if self.tokens_per_second:
            seconds = self.tokens / self.tokens_per_second
            lines.append(f"time         about {_duration(seconds)} at {self.tokens_per_second:,.0f} tokens/s")
        return "\n".join(lines)


def make_plan(
    config: Config,
    objective: nn.Module,
    vocabulary: int,
    rows: Rows,
    hidden_bytes: int = 0,
    tokens_per_second: float | None = None,
) -> TrainingPlan:
    """The plan for a configuration. All real tokens of the packs count as tokens, also those without loss.

    Raises ValueError where nothing is to be trained or no token of the data counts."""
    parameters = list(objective.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("objective trains no parameter, as all are frozen; give it some of its own")
    real, counted = rows.tokens_per_row()
    if not counted:
        raise ValueError("the data has no token of the target's own text (loss_mask is 0); prepare it with answers")
    count = sum(p.numel() for p in trained)
    tokens = config.budget.tokens or round(config.budget.tokens_per_param * count)
    steps = math.ceil(tokens / (config.optimisation.batch * real))
    everything = sum(p.numel() for p in parameters)
    return TrainingPlan(
        trained=count,
        trained_vocabulary=sum(p.numel() for p in trained if p.ndim == 2 and vocabulary in p.shape),
        frozen=everything - count,
        tokens=tokens,
        steps=steps,
        epochs=steps * config.optimisation.batch / len(rows),
        tokens_per_second=tokens_per_second,
        checkpoint_bytes=(config.run.keep + 2) * 4 * (3 * count + everything),  # the best one, and one being written
        hidden_bytes=hidden_bytes,
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
