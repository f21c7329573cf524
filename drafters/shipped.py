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
from .kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("smollm2-135m-medusa", "smollm2-135m-hydra", "smollm2-135m-draft")
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
    """The shipped drafter of `target` that commits the most tokens per step; None where there is none.

    Heads come before what forwards a network for every level of a tree: their steps are cheaper."""
    fingerprint = target_fingerprint(target)
    head_kinds = [name for name, kind in KINDS.items() if not kind.fills_dynamic]
    measured = [
        (config.get("paceline_drafter") in head_kinds, _measured(about), folder)
        for folder, config, about in _shipped()
        if _fingerprint(config) == fingerprint and _measured(about) is not None
    ]
    return max(measured, default=(None, None, None))[-1]


def drafters(args: Namespace) -> None:
    """The command `paceline drafters`: prints a table of the shipped drafters with their measurements."""
    here = {folder.name: (config, about) for folder, config, about in _shipped()}
    rows = []
    for name in dict.fromkeys([*NAMES, *here]):
        config, about = here.get(name, ({}, {}))
        kind = config.get("mode") or config.get("paceline_drafter") or "not in this copy"
        measured, prompts = _measured(about), (about.get("measured") or {}).get("prompts")
        number = "-" if measured is None else f"{measured:.2f}"
        rows.append([name, kind, (config.get("paceline_target") or {}).get("name", "-"), number, str(prompts or "-")])
    print(table(["name", "kind", "target", "tokens per step", "prompts"], rows))
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
