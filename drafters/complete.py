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
    name_or_path: str | Path,
    target: "PreTrainedModel",
    dtype: torch.dtype | None = None,
    of_any_target: bool = False,
) -> "PreTrainedModel":
    """The draft model of a folder, hub id or short name, in the target's dtype (or `dtype`) on the target's device;
    tensors that were left out are taken from the target.

    Raises ValueError where it cannot be loaded, and where it was made for another target, unless it may be
    `of_any_target` with the same shapes."""
    folder = None if str(name_or_path) in NAMED else read_folder(name_or_path)
    if folder is not None and not of_any_target:
        folder.check_target(target)
    if folder is None or not folder.config.get("paceline_left_out"):
        return load_target(name_or_path, dtype or target.dtype, target.device, with_tokenizer=False)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.path), dtype=dtype or target.dtype)
    tensors, expected = folder.tensors(), model.state_dict()
    for name, path_in_target in folder.config["paceline_left_out"].items():
        module, key = path_in_target.split(".")
        tensors[name] = dense_parameters(getattr(target, f"get_{module}")()).get(key, torch.empty(0)).cpu()
        if tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"drafter {folder.path} shares {name} of shape {list(expected[name].shape)} with its target, and this "
                f"one's is {list(tensors[name].shape)}; use a drafter of the same base model"
            )
    folder.check_tensors(tensors, expected)
    model.load_state_dict(tensors)
    return model.to(target.device).eval()
