"""Draft models that were saved without the weights they share with their target.

Their config names the tensors that were left out and where in the target they are. Such a folder is small; loaded
by anything but Paceline it would lack its embeddings. Knows nothing of drafting.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..spec.target.load import NAMED, load_target
from .folder import read_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def complete(
    name_or_path: str | Path, target: "PreTrainedModel", dtype: torch.dtype | None = None
) -> "PreTrainedModel":
    """The draft model of a folder, hub id or short name, in the target's dtype (or `dtype`) on the target's device,
    with the target's own tensors where it leaves them out.

    Raises ValueError where it cannot be loaded or shares weights with another target."""
    folder = None if str(name_or_path) in NAMED else read_folder(name_or_path)
    if folder is not None:
        folder.check_target(target)
    if folder is None or not folder.config.get("paceline_left_out"):
        return load_target(name_or_path, dtype or target.dtype, target.device, with_tokenizer=False)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder.path), dtype=dtype or target.dtype)
    tensors = folder.tensors()
    for name, place in folder.config["paceline_left_out"].items():
        module, key = place.split(".")
        tensors[name] = getattr(getattr(target, f"get_{module}")(), key).detach().cpu()
    folder.check_tensors(tensors, model.state_dict())
    model.load_state_dict(tensors)
    return model.to(target.device).eval()
