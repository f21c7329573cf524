"""Where plans and step times are stored, and reading `tree=`: a shape, a plan's file, or "auto" for the stored plan."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..engines.module_state import fingerprint
from ..files import cache_folder
from ..proposal import Drafter, parts_of
from ..stream.streamer import streamer_of
from ..target.weights import weights_form
from ..tree import DynamicShape, TreeShape
from .trees import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_path(model: "PreTrainedModel", drafter: Drafter, executor: str, rule: str, temperature: float) -> Path:
    """The file of the plan for a target and drafter on this device, with this executor, rule and temperature."""
    weights = [fingerprint(part.traits.modules) or repr(part) for part in parts_of(drafter)]
    return _kept("plans", [*_circumstances(model), drafter.name, weights, executor, rule, round(temperature, 2)])


def curve_path(model: "PreTrainedModel") -> Path:
    """The file of the step times of a streamed target on this device."""
    return _kept("curves", _circumstances(model))


def serving_path(model: "PreTrainedModel", drafter: Drafter, executor: str, room: int) -> Path:
    """The file of the step times of a served target on this device, by rows and tree, with texts of `room` tokens."""
    weights = [fingerprint(part.traits.modules) or repr(part) for part in parts_of(drafter)]
    return _kept("serving", [*_circumstances(model), drafter.name, weights, executor, room])


def _circumstances(model: "PreTrainedModel") -> list:
    """What step times depend on, but for the drafter: target and its kind of weights, how they are streamed, device."""
    cuda, streamer = model.device.type == "cuda", streamer_of(model)
    device = torch.cuda.get_device_name(model.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    streamed = None if streamer is None else asdict(streamer.about)
    return [model.config.to_json_string(), weights_form(model), streamed, device, str(model.dtype), torch.__version__]


def _kept(folder: str, key: list) -> Path:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_folder() / folder / f"{digest}.json"


def automatic_shape(
    model: "PreTrainedModel", drafter: Drafter, executor: str, rule: str, temperature: float
) -> TreeShape | DynamicShape:
    """The shape of the stored plan; the root alone where it is best not to speculate. Raises ValueError where there is
    no plan."""
    path = plan_path(model, drafter, executor, rule, temperature)
    if not path.is_file():
        raise ValueError(
            f"tree='auto' has no plan for drafter {drafter.name!r}, executor {executor!r}, rule {rule!r} and "
            f"temperature {temperature:g} on this model and device; make one with paceline plan, or pass a tree"
        )
    return Plan.load(path).shape


def read_shape(
    tree: str | Path | Sequence[int] | TreeShape | DynamicShape | None, drafter: Drafter | None
) -> TreeShape | DynamicShape:
    """The shape for a value of `tree=` other than "auto"; None is the default of `drafter`, needed only then."""
    if tree is None:
        assert drafter is not None
        return drafter.default_shape
    if isinstance(tree, Path) or (isinstance(tree, str) and tree.endswith(".json")):
        return Plan.load(tree).shape
    return TreeShape.parse(tree)
