"""The prepared data as the trainer reads it, and the order in which it reads.

The rows of a step depend on (seed, step) alone, not on the number of processes or on a kill and resume. Knows nothing
of models.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.compute as compute
import torch
from datasets import load_from_disk
from torch import Tensor

from ...spec.target.load import context_length
from .documents import tokenizer_fingerprint

COLUMNS = ("input_ids", "loss_mask", "position_ids", "document")


class Rows:
    """One split of the prepared data: N packs of L tokens."""

    def __init__(self, split):
        self.split = split.with_format("numpy", columns=list(COLUMNS))
        self.length = len(split[0]["input_ids"])

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, rows: list[int], device="cpu") -> dict[str, Tensor]:
        """The packs numbered `rows`: `input_ids`, `loss_mask`, `position_ids`, `document`, each (B, L)."""
        taken = self.split[rows]
        return {name: torch.from_numpy(np.stack(taken[name])).to(device, torch.int64) for name in COLUMNS}

    def extremes(self, column: str) -> tuple[int, int]:
        """The least and the largest number in a column, over all rows."""
        parts = self.split.with_format("arrow", columns=[column]).iter(batch_size=1000)
        both = [compute.min_max(compute.list_flatten(part[column])).as_py() for part in parts]
        return min(part["min"] for part in both), max(part["max"] for part in both)

    def tokens_per_row(self, sample: int = 512) -> tuple[float, float]:
        """Mean numbers of real tokens and of counted tokens in a row, over `sample` rows spread evenly."""
        rows = sorted({round(position) for position in np.linspace(0, len(self) - 1, min(sample, len(self)))})
        batch = self.batch(rows)
        return [float(mask.float().sum() / len(rows)) for mask in (batch["document"] >= 0, batch["loss_mask"] > 0)]


def open_data(folder: str | Path) -> tuple[dict[str, Rows], dict]:
    """The splits `train` and `held_out` (which may be missing) of a folder made by `paceline data prepare`, and
    its description."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "paceline.json").read_text(encoding="utf-8"))
        splits = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data folder {folder} cannot be read ({type(error).__name__}: {error}); make it with paceline data prepare"
        ) from error
    if not splits.get("train"):
        raise ValueError(f"data folder {folder} has no rows to train on; prepare more text")
    for name, split in splits.items():
        if missing := [column for column in COLUMNS if column not in split.column_names]:
            raise ValueError(f"{name} of {folder} has no column {missing[0]!r}; make it with paceline data prepare")
    return {name: Rows(split) for name, split in splits.items() if name in ("train", "held_out")}, about


def check_tokenizer(about: dict, tokenizer, folder: str | Path) -> None:
    """Raise ValueError where a folder, described by `about`, was prepared with another tokenizer."""
    prepared_with = about.get("tokenizer")
    if isinstance(prepared_with, str) and prepared_with != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"data folder {folder} was prepared with another tokenizer than the target's; prepare it for this target"
        )


def check_rows(splits: dict[str, Rows], model, folder: str | Path) -> None:
    """Raise ValueError for ids beyond the vocabulary of `model`, and for texts longer than its context."""
    vocabulary, context = model.config.get_text_config().vocab_size, context_length(model)
    for name, rows in splits.items():
        least, largest = rows.extremes("input_ids")
        if not 0 <= least <= largest < vocabulary:
            raise ValueError(
                f"{name} of data folder {folder} has token ids from {least} to {largest}, and the target's vocabulary "
                f"ends at {vocabulary - 1}; prepare it with the target's own tokenizer"
            )
        longest = rows.extremes("position_ids")[1] + 1
        if context is not None and longest > context:
            raise ValueError(
                f"{name} of data folder {folder} has texts of {longest} tokens, and the target's context is {context}; "
                f"prepare it with --length {context} or less"
            )


def fingerprint(splits: dict[str, Rows], about: dict) -> str:
    """A hash of the rows (a sample) and of how they were made; it does not depend on the folder's path."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)} {rows.length}".encode())
        for row in (0, len(rows) // 2, len(rows) - 1):
            digest.update(rows.batch([row])["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_of_step(step: int, batch: int, count: int, seed: int) -> list[int]:
    """The `batch` rows of step `step`: a slice of one endless sequence of shuffled epochs of `count` rows each."""
    positions = range(step * batch, (step + 1) * batch)
    orders = {epoch: _shuffled(seed, epoch, count) for epoch in {position // count for position in positions}}
    return [int(orders[position // count][position % count]) for position in positions]


@lru_cache(2)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
