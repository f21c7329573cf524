"""The registry of drafter kinds: for each, the class that drafts and the one that trains it. A new kind is a line here.

A kind's name is the value of `paceline_drafter` in a drafter's config, of `objective.kind` in a training configuration,
and of `kind` in a drafter's traits. Classes are imported on first use.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..spec.proposal import Drafter
    from .folder import DrafterFolder


class DrafterClass(Protocol):
    """A class whose objects are drafters of one kind."""

    def load(self, source: str | Path, folder: "DrafterFolder | None", target: "PreTrainedModel") -> "Drafter":
        """The drafter for `target`: `source` is the name or path asked for, `folder` the drafter folder found there,
        None where there is none."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Where the classes of a kind are: `drafter` is a `DrafterClass`, `objective` an `Objective` of `training`.

    Each is given as "module:name", the module relative to this package."""

    drafter: str
    objective: str | None = None  # trains the kind and measures its acceptance on text; None: neither
    weights: bool = True  # stored in a folder; a kind without weights is loaded by its own name
    fills_dynamic: bool = False  # the same as in its traits: it forwards a network for every level of a tree

    def drafter_class(self) -> DrafterClass:
        return _class(self.drafter)

    def objective_class(self) -> Any:
        assert self.objective is not None, "nothing trains this kind"
        return _class(self.objective)


KINDS = {
    "ngram": Kind(".ngram:NgramDrafter", weights=False),
    "medusa": Kind(".medusa:MedusaDrafter", "..training.objectives.heads:MedusaObjective"),
    "draft_lm": Kind(".draft_model:ModelDrafter", "..training.objectives.draft_lm:DraftObjective", fills_dynamic=True),
    "eagle": Kind(".eagle.drafter:EagleDrafter", "..training.objectives.eagle:EagleObjective", fills_dynamic=True),
}


def _class(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(import_module(module, __package__), attribute)
