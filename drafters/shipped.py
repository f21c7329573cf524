"""Drafters that come with the package, in `pretrained/`: their names, and which of them is best for a target.

Reads their JSON files only, never the weights.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..spec.console import table
from .folder import target_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("smollm2-135m-medusa", "smollm2-135m-hydra", "smollm2-135m-draft", "smollm2-135m-eagle")
PRETRAINED = Path(__file__).resolve().parent / "pretrained"


def shipped_folder(name: str | Path) -> Path | None:
    """The folder of a shipped drafter; None for any other name, and where the working folder has one of that name.

    Raises ValueError where the name is known but this copy of the package lacks the drafter."""
    if str(name) not in NAMES or Path(name).is_dir():
        return None
    folder = PRETRAINED / str(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"drafter {name} is not in this copy of the package (drafters/pretrained/{name} is missing); install a "
            f"release that has it, or train it with paceline train {name}"
        )
    return folder


def best_shipped(target: "PreTrainedModel") -> Path | None:
    """The shipped drafter of `target` that decoded the fastest on devices like the target's, with prompt lookup beside
    it; None where there is none. Of those that were not timed it is the one that commits the most tokens per step."""
    fingerprint, times = target_fingerprint(target), speeds(target.device.type)
    measured = [
        (times.get(folder.name, 0.0), _measured(about), folder)
        for folder, config, about in _shipped()
        if _fingerprint(config) == fingerprint and _measured(about) is not None
    ]
    return max(measured, default=(None, None, None))[-1]


def speeds(device: str) -> dict[str, float]:
    """How many times as fast as plain decoding the shipped drafters were on a kind of device ("cpu", "cuda"), with
    prompt lookup beside them, by name. A kind on which none was timed is taken for a CPU."""
    kinds = _read(speeds_file())
    about = kinds.get(device) or kinds.get("cpu") or {}
    return about.get("times", {})


def speeds_file() -> Path:
    """For each kind of device the measured speeds, and the run that they are from (docs/cpu/speeds.py writes it)."""
    return PRETRAINED / "speeds.json"


def drafters(args: Namespace) -> None:
    """The command `paceline drafters`: prints a table of the shipped drafters with their measurements."""
    here = {folder.name: (config, about) for folder, config, about in _shipped()}
    rows = []
    for name in dict.fromkeys([*NAMES, *here]):
        config, about = here.get(name, ({}, {}))
        kind = config.get("mode") or config.get("paceline_drafter") or "not in this copy"
        measured, prompts = _measured(about), (about.get("measured") or {}).get("prompts")
        number = "-" if measured is None else f"{measured:.2f}"
        target, fast = (config.get("paceline_target") or {}).get("name", "-"), speeds("cpu").get(name)
        rows.append([name, kind, target, number, str(prompts or "-"), "-" if fast is None else f"{fast:.2f}"])
    print(table(["name", "kind", "target", "tokens per step", "prompts", "times plain on a CPU, with ngram"], rows))
    print("\nOther drafters: ngram, which needs no weights, and any drafter folder or hub id.")


def _shipped() -> Iterator[tuple[Path, dict, dict]]:
    """Folder, config and acceptance of every drafter in `pretrained/`."""
    for config in sorted(PRETRAINED.glob("*/config.json")):
        yield config.parent, _read(config), _read(config.parent / "acceptance.json")


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); install the package again") from error
    return content if isinstance(content, dict) else {}


def _fingerprint(config: dict) -> str | None:
    return (config.get("paceline_target") or {}).get("fingerprint")


def _measured(acceptance: dict) -> float | None:
    return (acceptance.get("measured") or {}).get("tokens_per_step")
