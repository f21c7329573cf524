"""A cache of loaded drafters per target, so that the next call reuses the same object and its compiled steps.

A drafter is loaded again when files of its folder have changed. Knows no kind of drafter in particular.
"""

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..spec.files import cache_folder
from ..spec.proposal import Drafter
from ..spec.target.adapters import adapter_digest
from ..spec.target.load import NAMED
from . import load_drafter, shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = 4  # drafters per target
_loaded: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()


def kept_drafter(which: Any, target: "PreTrainedModel") -> Drafter:
    """Like `load_drafter(which, target)`, but a name gives the cached drafter where nothing has changed since."""
    if not isinstance(which, (str, Path)):
        return load_drafter(which, target)
    kept, name, state = _loaded.setdefault(target, {}), str(which), state_of(str(which), target)
    before, drafter = kept.pop(name, (None, None))
    if before != state:
        drafter = load_drafter(which, target)
    kept[name] = state, drafter  # the most recently used comes last
    if len(kept) > KEPT:
        del kept[next(iter(kept))]
    return drafter


def state_of(name: str, target: "PreTrainedModel") -> tuple:
    """All that the drafter `name` depends on: the target's device, dtype, vocabulary and active adapters, each file's
    size and time."""
    parts = [name] if Path(name).exists() else name.split("+")
    files = [file for part in parts for folder in _folders(part) for file in sorted(folder.rglob("*"))]
    files += [Path(name)] if Path(name).is_file() else []
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    form = str(target.device), target.dtype, target.config.get_text_config().vocab_size, adapter_digest(target)
    return *form, *((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


def _folders(part: str) -> list[Path]:
    """The local folders that a name may be loaded from; none for a hub id, which is assumed not to change."""
    if part == "auto":
        return [shipped.PRETRAINED]
    if Path(part).is_dir():
        return [Path(part).resolve()]
    return [cache_folder() / part] if part in NAMED else [shipped.PRETRAINED / part] if part in shipped.NAMES else []
