"""The kinds of drafters: for each, the class that drafts and the one that trains it. A new kind is a line here.

A kind's name is what `paceline_drafter` says in a drafter's config, `objective.kind` in a training configuration, and
`kind` in a drafter's traits. Classes are imported on use. Knows nothing of what they do.
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
        """The drafter for `target`: `source` is the name or path asked for, `folder` what was found there, None where
        that is no drafter folder."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Classes as "module:name", a module with leading dots counted from this folder.

    A drafter's is a `DrafterClass`, an objective's an `Objective` of `training`."""

    drafter: str
    objective: str | None = None  # which trains, and judges on text; None: nothing does
    weights: bool = True  # in a folder; a kind that has none is loaded by its own name
    follows_any_tree: bool = False  # as its traits say

    def drafter_class(self) -> DrafterClass:
        return _class(self.drafter)

    def objective_class(self) -> Any:
        assert self.objective is not None, "nothing trains this kind"
        return _class(self.objective)


KINDS = {
    "ngram": Kind(".ngram:NgramDrafter", weights=False, follows_any_tree=True),
    "medusa": Kind(".medusa:MedusaDrafter", "..training.objectives.heads:MedusaObjective", follows_any_tree=True),
    "draft_lm": Kind(".draft_model:ModelDrafter", "..training.objectives.draft_lm:DraftObjective"),
}
MODEL = "draft_lm"  # the kind of an ordinary model, whose config names none


def _class(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(import_module(module, __package__), attribute)
