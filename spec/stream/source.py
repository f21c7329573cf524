"""Where the weights of a model to be streamed come from, tensor by tensor: folders of safetensors as transformers reads
them, folders of `paceline quantise`, and GGUF files. The whole model is never in memory. Knows nothing of what becomes
of the weights.
"""

import logging
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..kernels.block_linear import BlockLinear
from ..kernels.rotation import Rotation
from ..quantise.folder import WEIGHTS, FileTensors, block_layer, checked_layers
from ..target.gguf_file import GgufFile
from ..target.gguf_model import BlockReader
from ..target.sources import why_not_loaded
from ..target.taps import layer_stacks
from ..target.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Source(Protocol):
    """A model's weights, by the names of its parameters."""

    frame: "PreTrainedModel"  # the model, most of whose parameters are on the meta device

    def read(self, name: str) -> Tensor:
        """A parameter or a buffer, in the dtype of the frame's."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a matrix."""

    def in_blocks(self, path: str) -> bool:
        """Whether the weight of the linear layer at `path` is in blocks."""

    def blocks(self, path: str) -> BlockLinear:
        """That linear layer, without its bias."""

    def signs(self) -> dict[str, Tensor]:
        """Of the rotations of such layers: by the name `signs.INPUTS`."""


@contextmanager
def by_transformers(folder: str | Path) -> Iterator[None]:
    """What transformers refuses of a folder in the block, often at length, is told in a sentence."""
    try:
        yield
    except ValueError as error:
        raise ValueError(why_not_loaded(str(folder), str(folder), error)) from error


@contextmanager
def _unwarned() -> Iterator[None]:
    """Accelerate does not warn in the block that a model is on the disk, as it is meant to be here."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def name_among(names: Container[str], name: str, frame: "PreTrainedModel") -> str:
    """The name by which `names` have a parameter: one that is tied may be there under the other name only."""
    if name in names:
        return name
    tied = frame.all_tied_weights_keys.items()
    return next((other for pair in tied if name in pair for other in pair if other != name), name)


def skeleton(config: "PreTrainedConfig", dtype: torch.dtype, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a configuration, its parameters on the meta device and its buffers as they are made."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_empty_weights(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def layer_stack(model: "PreTrainedModel") -> str:
    """The path of the decoder layers. Raises ValueError for a model that is no plain stack of them."""
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} is no plain stack of decoder layers, which is what can be streamed; load it "
            "without stream="
        )
    return stacks[0]


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The path of a module in a model; None where it is not there."""
    return next((path for path, each in model.named_modules() if each is module), None)


class FolderSource:
    """A folder of safetensors. Transformers maps the parameters to tensors of the files, by its own offloading to disk;
    those that it makes of several are written to `work` before they are read."""

    def __init__(
        self, folder: str, config: "PreTrainedConfig", dtype: torch.dtype, trust_remote_code: bool, work: Path
    ):
        from transformers import AutoModelForCausalLM

        self.folder = folder
        outline = skeleton(config, dtype, trust_remote_code)
        stack, ends = layer_stack(outline), (outline.get_input_embeddings(), outline.get_output_embeddings())
        small = [path for path, each in outline.named_modules() if each._parameters or each._buffers]
        places = {path: "cpu" for path in small if not path.startswith(f"{stack}.")}
        places |= {path: "disk" for path in (stack, *(path_of(outline, end) for end in ends)) if path is not None}
        with _unwarned(), by_transformers(folder):
            self.frame, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map=places,
                offload_folder=str(work),
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        absent = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
        if absent:
            raise ValueError(
                f"the weights of {folder} lack {absent[0]} and {len(absent) - 1} more; fetch the model again"
            )
        maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in self.frame.modules())
        self.index: dict[str, dict] = next(each.dataset.index for each in maps if each is not None)
        self.state = self.frame.state_dict()

    def _stored(self, name: str) -> dict:
        return self.index[name_among(self.index, name, self.frame)]

    def read(self, name: str) -> Tensor:
        if not self.state[name].is_meta:
            return self.state[name]
        stored = self._stored(name)
        with safe_open(stored["safetensors_file"], "pt") as file:
            tensor = file.get_tensor(stored["weight_name"])
        self._check(name, tensor.shape)
        return tensor.to(self.state[name].dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not self.state[name].is_meta:
            return self.state[name][start:stop]
        stored = self._stored(name)
        with safe_open(stored["safetensors_file"], "pt") as file:
            matrix = file.get_slice(stored["weight_name"])
            self._check(name, matrix.get_shape())
            return matrix[start:stop].to(self.state[name].dtype)

    def _check(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError for a tensor that is not of the shape that the configuration gives it."""
        if tuple(shape) != (wanted := tuple(self.state[name].shape)):
            raise ValueError(
                f"{name} of {self.folder} is {tuple(shape)} in its weights and {wanted} by its configuration; fetch "
                "the model again"
            )

    def in_blocks(self, path: str) -> bool:
        return False

    def blocks(self, path: str) -> BlockLinear:
        raise AssertionError("there are none")

    def signs(self) -> dict[str, Tensor]:
        return {}


class QuantisedSource:
    """A folder of `paceline quantise`."""

    def __init__(self, folder: Path, frame: "PreTrainedModel", config: "PreTrainedConfig", weights: Weights):
        self.folder, self.frame, self.weights = folder, frame, weights
        self.layers = checked_layers(folder, config, weights)
        self.tensors = FileTensors(folder / WEIGHTS)
        self.rotations: dict[tuple[int, int], Rotation] = {}

    def read(self, name: str) -> Tensor:
        return self.tensors[name_among(self.tensors, name, self.frame)].to(self.frame.state_dict()[name].dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.tensors.rows(name_among(self.tensors, name, self.frame), start, stop)
        return rows.to(self.frame.state_dict()[name].dtype)

    def in_blocks(self, path: str) -> bool:
        return path in self.layers

    def blocks(self, path: str) -> BlockLinear:
        linear, form = self.frame.get_submodule(path), self.layers[path]
        int8 = self.weights.int8_activations
        return block_layer(self.folder, path, form, linear, self.tensors, int8, self.rotations)

    def signs(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.tensors if name.startswith("signs.")}


class GgufSource:
    """A GGUF file, its linear layers in blocks where `weights` say so."""

    def __init__(self, file: GgufFile, frame: "PreTrainedModel", weights: Weights):
        self.frame, self.weights = frame, weights
        self.reader = BlockReader(file, frame.config)
        self.kept = self.reader.kept(weights) if weights.bits else {}
        self.parameters: dict[str, Tensor] = dict(frame.named_parameters(remove_duplicate=False))

    def read(self, name: str) -> Tensor:
        self.reader.file.forget()
        return self.reader.read(name, self.parameters[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.reader.file.forget()
        return self.reader.read(name, self.parameters[name], slice(start, stop))

    def in_blocks(self, path: str) -> bool:
        return path in self.kept

    def signs(self) -> dict[str, Tensor]:
        return {}

    def blocks(self, path: str) -> BlockLinear:
        self.reader.file.forget()
        return BlockLinear(self.reader.blocks(self.kept[path]), None, self.weights.int8_activations).eval()
