"""Reporting of a training run: sums over tokens, JSON lines, trackers, the progress bar. Knows nothing of models."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..spec.console import Bar
from ..spec.files import whole


def tokens_per_step(hits: list[float], tried: list[float]) -> float:
    """Estimated tokens per step with a chain of first guesses: 1 + sum over depths d of the product of
    hits_i / tried_i for i <= d. At each depth only positions where all earlier depths were right are tried."""
    estimate, survival = 1.0, 1.0
    for right, all_ in zip(hits, tried):
        survival *= right / all_ if all_ else 0.0
        estimate += survival
    return estimate


@dataclass
class Tally:
    """Sums over tokens and processes, from which token-weighted figures are computed."""

    total: float = 0.0  # loss
    counted: float = 0.0
    tokens: float = 0.0  # real tokens read, counted in the loss or not
    hits: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.total, self.counted = self.total + other.total, self.counted + other.counted
        self.tokens += other.tokens
        zeros = [0.0] * len(other.hits)
        self.hits = [a + b for a, b in zip(self.hits or zeros, other.hits)]
        self.tried = [a + b for a, b in zip(self.tried or zeros, other.tried)]

    def figures(self, split: str) -> dict[str, float | None]:
        """Loss per token, accuracy of each depth given that all earlier depths were right, tokens per step."""
        accuracies = {
            f"{split}/acc_{d}": h / t if t else None for d, (h, t) in enumerate(zip(self.hits, self.tried), 1)
        }
        loss = self.total / self.counted if self.counted else None
        return {f"{split}/loss": loss, **accuracies, f"{split}/tokens_per_step": tokens_per_step(self.hits, self.tried)}


class Report:
    """Writes `metrics.jsonl`, feeds accelerate's trackers and shows a progress bar; on the main process only."""

    def __init__(self, folder: Path, accelerator, steps: int, done: int, settings: dict):
        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        if accelerator.is_main_process:
            _forget_after(self.path, done)
        accelerator.init_trackers("paceline", config=_flat(settings))
        self.bar = Bar(total=steps, initial=done, unit="step", disable=None if accelerator.is_main_process else True)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        if not self.accelerator.is_main_process:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    def show(self, tally: Tally, learning_rate: float, tokens_per_second: float) -> None:
        figures = tally.figures("")
        accuracies = "/".join(f"{v:.2f}" for name, v in figures.items() if "acc_" in name and v is not None)
        loss = "-" if figures["/loss"] is None else f"{figures['/loss']:.3f}"
        self.bar.set_postfix_str(
            f"loss {loss}, lr {learning_rate:.1e}, acc {accuracies}, {figures['/tokens_per_step']:.2f} tokens/step, "
            f"{tokens_per_second:.0f} tokens/s",
            refresh=False,
        )

    def close(self) -> None:
        self.bar.close()


def check_trackers(names: list[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracker {name} is not installed; pip install {name}, or take it out of run.trackers")


def _flat(settings: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _forget_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which will be run again, and a line that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            pass
    with whole(path) as unfinished:
        unfinished.write_text("".join(kept), encoding="utf-8")
