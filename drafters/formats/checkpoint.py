"""The files of a published drafter: its config, and its tensors by name, in a folder or on the model hub.

Only JSON and safetensors are read. Of a hub id the names of tensors are asked for first, so that an ordinary model is
not fetched for them. Knows no format.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...spec.console import quietly
from ..folder import PICKLES, fetch
from .eagle_names import without_prefixes
from .twins import pickle_refusal

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Pickles that training leaves beside weights, and that are none.
_STRAY = ("training_state", "training_args", "optimizer", "scheduler", "rng_state", "random_states")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config and safetensors. `files` says in which file each tensor is."""

    name: str  # as the user gave it
    path: Path
    files: dict[str, Path]
    saved: bool = True  # as `save_pretrained` does, in contrast to a file that lies beside such weights

    def config(self) -> dict[str, Any]:
        """The content of its config.json; empty where there is none. Raises ValueError for a damaged one."""
        file = self.path / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no JSON file ({error}); fetch the drafter again") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds no JSON object; fetch the drafter again")
        return content

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors. Raises ValueError for a damaged file, for numbers in a format of few bits, and for NaN."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            try:
                with safe_open(file, "pt") as opened:
                    tensors |= {name: opened.get_tensor(name) for name in inside}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); fetch the drafter again") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype not in FLOATS:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise self.refused(f"tensor {name!r} is stored as {dtype}, which is not read; take 16-bit weights")
            if not tensor.isfinite().all():
                raise self.refused(f"tensor {name!r} holds NaN or infinite numbers; fetch the drafter again")
        return tensors

    def plain_names(self) -> dict[str, str]:
        """The names of its tensors by what they are without meaningless prefixes."""
        try:
            return without_prefixes(self.files)
        except ValueError as error:
            raise self.refused(str(error)) from error

    def check(self, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless `tensors`, by the names of this file, are those of `shapes`."""
        extra = sorted(tensors.keys() - shapes.keys())
        for name in sorted(shapes.keys() - tensors.keys()):
            also = f" and has {extra[0]!r}, which it has no place for" if extra else ""
            raise self.refused(f"it lacks the tensor {name!r}{also}; fetch the drafter again")
        if extra:
            raise self.refused(
                f"it has a tensor {extra[0]!r}, which its format has no place for; it is of another, which is not read"
            )
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise self.refused(
                    f"tensor {name!r} has shape {list(tensors[name].shape)}, and {list(shape)} fits the other tensors "
                    "and this target; fetch the drafter again, or use one made for this target"
                )
            self.check_weights(name, tensors[name])

    def check_weights(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError unless a tensor holds numbers of floating point."""
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise self.refused(f"tensor {name!r} holds {dtype} and no weights; fetch the drafter again")

    def refused(self, why: str) -> ValueError:
        return ValueError(f"drafter {self.name}: {why}")


def open_checkpoints(name_or_path: str | Path) -> list[Checkpoint]:
    """The weights of a folder or hub id, as `save_pretrained` writes them, and then each other safetensors file: one of
    heads may lie beside a whole model. Of a hub id these know the names of tensors, and no files yet (see `fetched`).

    Empty for what holds no weights. Raises ValueError where these are pickles, or a file is damaged."""
    name = str(name_or_path)
    folder = Path(name) if Path(name).is_dir() else _cached(name)
    if folder is None:
        return _on_the_hub(name)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    _refuse_pickles(name, names)
    read = [_of_files(name, folder, *group) for group in _groups(names, lambda: shards_of(folder / INDEX))]
    return [checkpoint for checkpoint in read if checkpoint.files]


def fetched(checkpoint: Checkpoint) -> Checkpoint:
    """The same with all its files in a folder."""
    if Path(checkpoint.name).is_dir():
        return checkpoint
    folder = fetch(checkpoint.name)
    return _of_files(checkpoint.name, folder, {file.name for file in checkpoint.files.values()}, checkpoint.saved)


def _groups(names: list[str], shards: Callable[[], set[str]]) -> list[tuple[set[str], bool]]:
    """The files that belong together: of the index, or the one of `save_pretrained`, as the bool says; then every other
    one."""
    saved = shards() if INDEX in names else {WEIGHTS} & set(names)
    others = [file for file in names if file.endswith(".safetensors") and file not in saved]
    return [*([(saved, True)] if saved else []), *(({file}, False) for file in others)]


def shards_of(index: Path) -> set[str]:
    """The files that an index of weights names. Raises ValueError for what is none."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all(PurePosixPath(file).name == file for file in files):
            return files
        raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error}); fetch the drafter again") from error


def _of_files(name: str, folder: Path, files: set[str], saved: bool) -> Checkpoint:
    inside: dict[str, Path] = {}
    for file in sorted(files):
        try:
            with safe_open(folder / file, "pt") as opened:
                inside |= dict.fromkeys(opened.keys(), folder / file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read ({error}); fetch the drafter again") from error
    return Checkpoint(name, folder, inside, saved)


def _cached(name: str) -> Path | None:
    """The folder of a hub id whose weights were fetched before, all of them."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        index = folder / INDEX
        files = shards_of(index) if index.is_file() else {file.name for file in folder.glob("*.safetensors")}
    except (OSError, ValueError):
        return None
    return folder if files and all((folder / file).is_file() for file in files) else None


def _on_the_hub(name: str) -> list[Checkpoint]:
    """Of a hub id: the names of its tensors, from the beginnings of its files."""
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    try:
        with quietly():
            names = [file for file in api.list_repo_files(name) if "/" not in file]
            folder = Path(hf_hub_download(name, "config.json")).parent if "config.json" in names else Path(name)
            groups = _groups(names, lambda: shards_of(Path(hf_hub_download(name, INDEX))))
            read = [
                {
                    tensor: Path(file)
                    for file in files
                    for tensor in api.parse_safetensors_file_metadata(name, file).tensors
                }
                for files, _ in groups
            ]
    except Exception:  # whatever the hub raises: who loads it as a model says what is wrong
        return []
    _refuse_pickles(name, names)
    return [Checkpoint(name, folder, files, saved) for files, (_, saved) in zip(read, groups)]


def _refuse_pickles(name: str, files: list[str]) -> None:
    if any(file.endswith((".safetensors", ".gguf")) for file in files):
        return
    pickles = [file for file in files if file.endswith(PICKLES) and not file.startswith(_STRAY)]
    index = next((file for file in files if file.endswith(tuple(f"{ending}.index.json" for ending in PICKLES))), None)
    if pickles:
        raise ValueError(pickle_refusal(name, pickles[0], index))
