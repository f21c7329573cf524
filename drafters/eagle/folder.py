"""EAGLE networks in drafter folders of our own. Knows no published layout."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..folder import DrafterFolder, write_folder
from .network import EagleNetwork
from .settings import EagleSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_network(network: EagleNetwork, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a drafter folder, the weights in `dtype`. Tensors of the target are not stored."""
    sizes = {"vocab_size": network.vocab_size, "known_tokens": len(network.vocabulary)}
    config = {"paceline_drafter": "eagle", "paceline_target": network.target, **asdict(network.settings), **sizes}
    config |= {} if network.origin is None else {"paceline_start": network.origin}
    stored = network.stored().items()
    write_folder(folder, config, {name: part.to(dtype) if part.is_floating_point() else part for name, part in stored})


def load_network(folder: DrafterFolder, target: "PreTrainedModel") -> EagleNetwork:
    """The network of a drafter folder in the target's dtype, on its device.

    Raises ValueError for settings or tensors that do not fit. The target's fingerprint is not checked here."""
    config = folder.config
    try:
        settings = EagleSettings(**{field.name: config[field.name] for field in fields(EagleSettings)})
        known, vocab_size = config["known_tokens"], config["vocab_size"]
    except KeyError as error:
        raise ValueError(f"drafter {folder.path}: its config lacks {error.args[0]!r}; fetch it again") from None
    tensors, vocabulary = folder.tensors(), None
    if known != vocab_size:
        vocabulary = tensors.get("vocabulary")
        if vocabulary is None or vocabulary.shape != (known,):
            raise ValueError(f"drafter {folder.path} lacks the list of its {known} tokens; fetch it again")
    network = EagleNetwork(settings, target, vocabulary)
    folder.check_tensors(tensors, network.stored())
    network.load_state_dict(tensors, strict=False)  # what is not stored is the target's
    network.origin = config.get("paceline_start")
    return network.to(target.dtype).requires_grad_(False).eval()
