"""Draft models that were saved without the weights they share with their target.

Such a folder is small, but only Paceline can load it: its config (`paceline_left_out`) maps every tensor that was left
out to the target's module and parameter that replaces it. Knows nothing of drafting.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..spec.target.load import NAMED, load_target
from ..spec.target.weights import dense_parameters
from .folder import read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def complete(
    name_or_path: str | Path, target: "PreTrainedModel", dtype: torch.dtype | None = None
) -> "PreTrainedModel":
    """The draft model of a folder, hub id or short name, in the target's dtype (or `dtype`) on the target's device;
    tensors that were left out are taken from the target.

    Raises ValueError where it cannot be loaded or shares weights with another target."""
    folder = None if str(name_or_path) in NAMED else read_folder(name_or_path)
    if folder is not None:
        folder.check_target(target)
    if folder is None or not folder.config.get("paceline_left_out"):
        return load_target(name_or_path, dtype or target.dtype, target.device, with_tokenizer=False)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.path), dtype=dtype or target.dtype)
    tensors = folder.tensors()
    for name, path_in_target in folder.config["paceline_left_out"].items():
        module, key = path_in_target.split(".")
        tensors[name] = dense_parameters(getattr(target, f"get_{module}")())[key].cpu()
    folder.check_tensors(tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model.to(target.device).eval()
