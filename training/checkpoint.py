"""Checkpoints: folders that are written atomically, with all that a trainer needs to resume exactly.

A checkpoint is a drafter folder with the trainer's state in `trainer/`: float32 weights and AdamW's moments as
safetensors, the rest as JSON. Random state is not saved, because every step seeds itself. A checkpoint is written to a
hidden folder beside it, which is then renamed, and renamed before it is deleted: a kill -9 at any moment leaves the
last complete one. Knows nothing of training.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..spec.files import lock, write_json


class Checkpoints:
    """The folders `step-00000100` in `root`, with the links `latest` and `best` to two of them."""

    def __init__(self, root: Path, keep: int):
        self.root, self.keep = root, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.root.glob("step-*") if path.is_dir())

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write the checkpoint of `step`: `fill(path)` writes its files into a temporary folder, which is then renamed.

        Raises ValueError where the disk is full or fails; all earlier checkpoints stay."""
        folder = self.folder(step)
        unfinished = self.root / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            fill(unfinished)
            for path in [*unfinished.rglob("*"), unfinished]:
                _to_disk(path)
            os.rename(unfinished, folder)
            _to_disk(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = f"that of step {self.steps()[-1]} is kept" if self.steps() else "there is none before it"
            raise ValueError(
                f"the checkpoint of step {step} cannot be written to {self.root} ({error}), {kept}; free some space "
                "and go on with --resume"
            ) from error

    def point(self, name: str, step: int) -> None:
        """Make `name` a symbolic link to the checkpoint of `step`, atomically."""
        unfinished = self.root / f".{name}.unfinished"
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(self.folder(step).name)
        os.replace(unfinished, self.root / name)
        _to_disk(self.root)

    def rotate(self, best: int | None) -> None:
        """Delete all but the newest `keep` checkpoints and the best."""
        for step in self.steps()[: -self.keep]:
            if step != best:
                old = self.root / f".step-{step:08d}.old"
                os.rename(self.folder(step), old)
                shutil.rmtree(old)

    def clean(self) -> None:
        """Remove what a killed run left half written or half deleted."""
        for path in [*self.root.glob(".step-*.unfinished"), *self.root.glob(".step-*.old")]:
            shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def gather(objective: nn.Module, optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained weights and AdamW's state by name, unsharded, on the CPU. Under FSDP2 all processes must call it."""
    weights, moments = {}, {}
    for name, parameter in trained(objective):
        weights[name] = _whole(parameter)
        for key, tensor in optimizer.state.get(parameter, {}).items():
            moments[f"{key}/{name}"] = _whole(tensor)
    return weights, moments


def restore(objective: nn.Module, optimizer, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    """The reverse of `gather`, into parameters that may be sharded."""
    with torch.no_grad():
        for name, parameter in trained(objective):
            parameter.copy_(_alike(weights[name], parameter))
    kept = {}
    for path, tensor in moments.items():
        key, name = path.split("/", 1)
        kept.setdefault(name, {})[key] = tensor
    for name, parameter in trained(objective):
        state = kept.get(name, {})
        optimizer.state[parameter] = {
            key: tensor if tensor.ndim == 0 and key == "step" else _alike(tensor, parameter)
            for key, tensor in state.items()
        }


def trained(objective: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .cpu()
        .clone(memory_format=torch.contiguous_format)
    )


def _alike(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` on the device of `like`, and sharded in the same way."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def write_state(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict) -> None:
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    write_json(folder / "state.json", state)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors"), state
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {folder.parent} cannot be read ({error}); delete it to go on from the one before"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """In the block no other run writes to `folder`. Raises ValueError where one does."""
    if os.name == "nt":  # which opens no folders
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise ValueError(
                f"run.folder {folder} is in use by another training; wait for it, or choose another folder"
            )
        yield
    finally:
        os.close(descriptor)


def differences(present: dict, saved: dict, where: str = "") -> list[str]:
    """One phrase for each difference between the `present` settings and the `saved` ones, nested dicts."""
    phrases = []
    for key in [*present, *(key for key in saved if key not in present)]:
        name, here, there = f"{where}{key}", present.get(key), saved.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            phrases += differences(here, there, f"{name}.")
        elif here != there:
            phrases.append(f"{name} is {here!r} now and was {there!r}")
    return phrases
