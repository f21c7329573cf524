"""What a model to be streamed is made from: a folder of safetensors, a folder of `paceline quantise`, or a GGUF file.
Tells its configuration, its tokenizer and its files at once, and gives its weights when they are asked for. Knows
nothing of what becomes of the weights.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..kernels.cpu import computed_in
from ..quantise.folder import WEIGHTS, FileTensors
from ..target.gguf_file import opened
from ..target.gguf_model import gguf_config, gguf_tokenizer, own_dtype
from ..target.weights import Weights
from .source import FolderSource, GgufSource, QuantisedSource, Source, by_transformers, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Asked:
    """What `load_target` was asked for."""

    where: str  # a folder or a file
    weights: Weights
    dtype: "str | torch.dtype"
    device: torch.device
    trust_remote_code: bool

    def settled(self, stated: torch.dtype) -> torch.dtype:
        """The dtype to compute in, of a model that is stored as `stated`."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        return computed_in(stated, self.device)


class Origin(Protocol):
    """A model that can be streamed."""

    asked: Asked
    files: list[Path]  # that its weights are in
    dtype: torch.dtype  # to compute in

    def skeleton(self) -> "PreTrainedModel":
        """The model without weights, its buffers as they are in a model that is loaded whole."""

    def tokenizer(self) -> Any: ...

    def bytes_repacked(self, in_panels: bool) -> int:
        """About how many bytes repacking writes, with or without our kernels' panels."""

    def source(self, work: Path) -> Any:
        """A context with its weights; `work` is a folder that there is not, to be used meanwhile."""


class FolderOrigin:
    """A folder as `save_pretrained` writes it."""

    def __init__(self, asked: Asked):
        from transformers import AutoConfig

        self.asked, self.folder = asked, Path(asked.where)
        self.files = weight_files(self.folder)
        with by_transformers(self.folder):
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=asked.trust_remote_code
            )
        if getattr(self.config, "quantization_config", None):
            raise ValueError(
                f"{self.folder} is quantised in a way that cannot be streamed; stream the model itself, or a folder "
                "that paceline quantise makes of it"
            )
        if not self.files:
            raise ValueError(f"{self.folder} has no safetensors to stream; save the model again with transformers")
        self.stored = self.config.dtype or stored_dtype(self.files[0])
        self.dtype = asked.settled(self.stored)
        self.made_in = self.dtype if isinstance(asked.dtype, torch.dtype) else self.stored

    def skeleton(self) -> "PreTrainedModel":
        from transformers import GenerationConfig

        with by_transformers(self.folder):
            model = skeleton(self.config, self.made_in, self.asked.trust_remote_code)
        if self.dtype != self.made_in:
            model = model.to(self.dtype)
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with by_transformers(self.folder):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.asked.trust_remote_code)

    def bytes_repacked(self, in_panels: bool) -> int:
        """Merged weights lie on the disk twice for a while."""
        frame = self.skeleton()
        merged = sum(parameter.nbytes for parameter in frame.parameters() if parameter.ndim > 2)
        return merged + dense_bytes(frame, in_panels and self.stored == torch.bfloat16)

    @contextmanager
    def source(self, work: Path) -> Iterator[Source]:
        shutil.rmtree(work, ignore_errors=True)
        try:
            yield FolderSource(self.asked.where, self.config, self.dtype, self.asked.trust_remote_code, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


class QuantisedOrigin(FolderOrigin):
    """A folder of `paceline quantise`."""

    def __init__(self, asked: Asked):
        super().__init__(asked)
        self.files, self.made_in = [self.folder / WEIGHTS], self.dtype

    def bytes_repacked(self, in_panels: bool) -> int:
        return block_bytes(self.skeleton(), self.files[0])

    @contextmanager
    def source(self, work: Path) -> Iterator[Source]:
        yield QuantisedSource(self.folder, self.skeleton(), self.config, self.asked.weights)


class GgufOrigin:
    """A GGUF file."""

    def __init__(self, asked: Asked):
        self.asked, self.files = asked, [Path(asked.where)]
        with opened(asked.where) as file:
            self.config, self.stored = gguf_config(file), own_dtype(file)
        self.dtype = asked.settled(self.stored)

    def skeleton(self) -> "PreTrainedModel":
        return skeleton(self.config, self.dtype)

    def bytes_repacked(self, in_panels: bool) -> int:
        frame = self.skeleton()
        if self.asked.weights.bits:
            return block_bytes(frame, self.files[0])
        return dense_bytes(frame, in_panels and self.stored == torch.bfloat16)

    def tokenizer(self) -> Any:
        with opened(self.asked.where) as file:
            return gguf_tokenizer(file)

    @contextmanager
    def source(self, work: Path) -> Iterator[Source]:
        with opened(self.asked.where) as file:
            yield GgufSource(file, self.skeleton(), self.asked.weights)


def stored_dtype(file: Path) -> torch.dtype:
    """The dtype of a file's first tensor: the model's, where its configuration does not say."""
    tensors = FileTensors(file)
    return tensors.rows(next(iter(tensors)), 0, 1).dtype


def weight_files(folder: Path) -> list[Path]:
    """The files that the weights of a folder are in: those of its index, where it has one, and no other copy beside."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return sorted({folder / name for name in index["weight_map"].values()})
    except FileNotFoundError:
        alone = folder / "model.safetensors"
        return [alone] if alone.is_file() else sorted(folder.glob("*.safetensors"))


def dense_bytes(frame: "PreTrainedModel", narrow: bool) -> int:
    """The bytes of a model's numbers, of which linear layers have 16 bits where they are `narrow`. A head that is tied
    to the embeddings is written too."""
    return sum(
        parameter.numel() * (2 if narrow and type(module) is nn.Linear else parameter.itemsize)
        for module in frame.modules()
        for parameter in module.parameters(recurse=False)
    )


def block_bytes(frame: "PreTrainedModel", file: Path) -> int:
    """About the bytes of a model in blocks: those of its file, the embeddings once more, and a tenth for scales."""
    return int(1.1 * file.stat().st_size) + frame.get_input_embeddings().weight.nbytes


def origin_of(asked: Asked) -> Origin:
    """What the model is made from. Raises ValueError for what cannot be read, and for weights that it has not."""
    if Path(asked.where).is_file():
        return GgufOrigin(asked)
    if (Path(asked.where) / WEIGHTS).is_file():
        return QuantisedOrigin(asked)
    if asked.weights.bits:
        raise ValueError(
            f"weights={asked.weights.name!r}: {asked.where} holds no weights in blocks; name a GGUF file, make a "
            "folder by paceline quantise, or load it with weights='16'"
        )
    return FolderOrigin(asked)
