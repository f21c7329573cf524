"""A causal LM from a GGUF file: its linear layers keep the file's blocks, all else is dequantised.

Transformers says what the file means: it makes the configuration, names the tensors, and undoes what llama.cpp did to
them. Tensors are read one by one. Knows nothing of where files come from.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..files import cache_folder
from ..kernels.block_linear import BlockLinear
from ..kernels.blocks import Blocks
from .gguf_blocks import TYPES, unpacked
from .gguf_file import GgufError, GgufFile, StoredTensor
from .weights import Weights, may_be_packed, refuse_saving

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OUTLINE = "outline.gguf"
_CHUNK = 1 << 24  # numbers that are dequantised at a time


def gguf_config(file: GgufFile) -> "PreTrainedConfig":
    """The configuration of a file's model. Raises what transformers raises for one that it does not know."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    architecture = file.settings.get("general.architecture")
    if architecture in GGUF_ARCHS and architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise GgufError(
            f"GGUF file {file.path} is of architecture {architecture}, whose tensors transformers reads in its own way "
            "only; load the model that the file was made from"
        )
    if file.settings.get("split.count", 1) not in (0, 1):
        raise GgufError(f"GGUF file {file.path} is a piece of a model; join its pieces with llama-gguf-split --merge")
    stated = file.settings.get(f"{architecture}.block_count", 0)
    if not isinstance(stated, int) or not 0 < stated <= len(layers):
        raise file.damaged(f"it states {stated} layers and holds the tensors of {len(layers)}")
    tokens = file.settings.get(f"{architecture}.vocab_size", file.lengths.get("tokenizer.ggml.tokens"))
    with _outline(file, tokenizer=False) as folder:
        said, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=_OUTLINE)
    return AutoConfig.for_model(
        **{**said, "vocab_size": tokens, "dtype": own_dtype(file), "_name_or_path": str(file.path)}
    )


def gguf_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a file. Reading it takes seconds, so it is kept in the cache folder."""
    from transformers import AutoTokenizer, __version__

    kept = cache_folder() / "tokenizers" / f"{file.digest()[:16]}-{__version__}"
    if kept.is_dir():
        return AutoTokenizer.from_pretrained(kept)
    with _outline(file, tokenizer=True) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_OUTLINE)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            tokenizer.save_pretrained(Path(folder) / "made")
            os.replace(Path(folder) / "made", kept)
    except OSError:  # a cache that cannot be written, or another process was faster
        return tokenizer
    return AutoTokenizer.from_pretrained(kept)  # the same from now on


@contextmanager
def _outline(file: GgufFile, tokenizer: bool) -> Iterator[str]:
    """A folder with the outline of a file and nothing else, which transformers would read too."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _OUTLINE).write_bytes(file.outline(tokenizer))
        yield folder


def own_dtype(file: GgufFile) -> torch.dtype:
    """The dtype of most numbers of a file; bfloat16 for blocks."""
    numbers: Counter[str] = Counter()
    for tensor in file.tensors.values():
        numbers[tensor.kind] += tensor.numbers
    kind = numbers.most_common(1)[0][0] if numbers else ""
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def gguf_model(file: GgufFile, weights: Weights, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """The model of a file, on a device, and a phrase about what is kept in blocks and what is not. Raises GgufError for
    weights that the file has not, and for a file whose tensors are not those of its model."""
    config = gguf_config(file)
    reader = BlockReader(file, config)
    kept = reader.kept(weights) if weights.bits else {}
    model = _empty(config, dtype, torch.device("cpu"))  # memory of weights that are replaced is never touched
    dense = reader.fill(model, kept)
    for path, tensor in kept.items():
        layer, blocks = model.get_submodule(path), reader.blocks(tensor)
        model.set_submodule(path, _block_linear(blocks, layer, weights, device))
    model = model.to(device).eval()
    if kept:
        refuse_saving(model)
    return model, _told(kept, dense, dtype)


def _empty(config: "PreTrainedConfig", dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _block_linear(blocks: Blocks, layer: Any, weights: Weights, device: torch.device) -> BlockLinear:
    bias = None if layer.bias is None else layer.bias.detach().to(device)
    return BlockLinear(blocks.to(device), bias, weights.int8_activations).eval()


def _told(kept: dict[str, StoredTensor], dense: dict[str, int], dtype: torch.dtype) -> str:
    kinds = Counter(tensor.kind for tensor in kept.values())
    blocks = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    size = sum(tensor.size for tensor in kept.values()) / 1e6
    others = ", ".join(f"{what} ({size / 1e6:.1f} MB)" for what, size in dense.items())
    form = str(dtype).removeprefix("torch.")
    return f"{len(kept)} linear layers in blocks ({blocks}; {size:.1f} MB); in {form}: {others}"


class BlockReader:
    """The tensors of a file as those of a model of transformers."""

    def __init__(self, file: GgufFile, config: "PreTrainedConfig"):
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.file = file
        frame = _empty(config, torch.float32, torch.device("meta"))
        architecture = file.settings["general.architecture"]
        self.processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        self.names: dict[str, str] = get_gguf_hf_weights_map(frame, self.processor)  # of the file: of the model
        tensors = {self.names[name]: tensor for name, tensor in file.tensors.items() if name in self.names}
        self.tensors_of: dict[str, list[StoredTensor]] = {}  # by the model's parameters
        for name, tensor in file.tensors.items():
            self.tensors_of.setdefault(self.names.get(name, ""), []).append(tensor)
        self._check(frame, tensors)
        paths = {path: module for path, module in frame.named_modules() if may_be_packed(path, module)}
        head, embeddings = frame.get_output_embeddings(), frame.get_input_embeddings()
        self.head = next((path for path, module in paths.items() if module is head), None)
        found = {path: tensors[f"{path}.weight"] for path in paths if f"{path}.weight" in tensors}
        self.linears = {path: tensor for path, tensor in found.items() if tensor.shape == paths[path].weight.shape}
        if self.head is not None and head.weight is embeddings.weight:
            name = next(path for path, module in frame.named_modules() if module is embeddings)
            self.linears[self.head] = tensors[f"{name}.weight"]

    def _check(self, frame: "PreTrainedModel", tensors: dict[str, StoredTensor]) -> None:
        """Raise GgufError where the model would not be filled by the file, before memory is taken for it."""
        total = 0
        for name, parameter in frame.named_parameters():
            total += parameter.numel()
            if name in tensors and parameter.ndim < 3 and tensors[name].numbers != parameter.numel():
                raise self.file.damaged(
                    f"tensor {tensors[name].name!r} has the shape {tensors[name].shape} and its settings say "
                    f"{tuple(parameter.shape)}"
                )
            if name not in tensors and parameter.ndim < 3:
                raise self.file.damaged(f"it lacks the tensor for {name}")
        if total > sum(tensor.numbers for tensor in self.file.tensors.values()):
            raise self.file.damaged("its tensors hold fewer numbers than its settings say")

    def kept(self, weights: Weights) -> dict[str, StoredTensor]:
        """The linear layers whose blocks are kept, by their paths. Raises GgufError where their bits are not those that
        are asked for."""
        kinds = Counter(tensor.kind for path, tensor in self.linears.items() if path != self.head)
        held = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
        name = f"weights={weights.name!r}: {self.file.path} holds its linear layers as {held or 'none'}"
        bits = [TYPES[kind][1] for kind in kinds if kind in TYPES]
        if not bits:
            raise GgufError(f"{name}, not in blocks that could be kept; load it with weights='16'")
        if weights.bits == 4 and min(bits) == 8:
            raise GgufError(f"{name}, of 8 bits; ask for weights={weights.name.replace('4', '8', 1)!r}")
        if weights.bits == 8 and min(bits) <= 4:
            raise GgufError(f"{name}, some of 4 bits or less; ask for weights={weights.name.replace('8', '4', 1)!r}")
        return {path: tensor for path, tensor in self.linears.items() if self.can_keep(tensor)}

    def can_keep(self, tensor: StoredTensor) -> bool:
        return tensor.kind in TYPES and self._rows(tensor) is not None

    def blocks(self, tensor: StoredTensor) -> Blocks:
        rows = self._rows(tensor)
        assert rows is not None
        return unpacked(tensor.kind, torch.from_numpy(self.file.raw(tensor)[rows]))

    def fill(self, model: "PreTrainedModel", kept: dict[str, StoredTensor]) -> dict[str, int]:
        """Dequantise what is not `kept` into the model; what that was, with the bytes that it takes."""
        left_out = {f"{path}.weight" for path in kept}
        parameters = {name: each for name, each in model.named_parameters() if name not in left_out}
        if lacking := sorted(parameters.keys() - self.tensors_of.keys()):
            raise self.file.damaged(f"it lacks the tensors for {lacking[0]} and {len(lacking) - 1} more")
        embeddings, sizes = model.get_input_embeddings().weight, Counter[str]()
        for name, parameter in parameters.items():
            self._copy(name, parameter.detach())
            tensor = self.tensors_of[name][0]
            what = (
                "embeddings" if parameter is embeddings else tensor.kind if len(tensor.shape) > 1 else "norms, biases"
            )
            sizes[what] += parameter.nbytes
        return dict(sizes)

    def read(self, name: str, like: Tensor, part: slice | None = None) -> Tensor:
        """A parameter of the shape and dtype of `like`, dequantised; of a matrix, some rows."""
        if part is not None:
            [tensor] = self.tensors_of[name]
            rows = self._rows(tensor) if tensor.shape == like.shape else None
            if rows is None:
                return self.read(name, like)[part]
            return torch.from_numpy(self._dequantised(tensor, rows[part])).to(like.dtype)
        made = torch.empty(like.shape, dtype=like.dtype)
        self._copy(name, made)
        return made

    def _copy(self, name: str, into: Tensor) -> None:
        """Dequantise a parameter: of one tensor of the file, or of several that transformers merges."""
        tensors, merged = self.tensors_of[name], dict[str, Any]()
        if len(tensors) == 1 and self._copy_rows(tensors[0], into):
            return
        for tensor in tensors:
            done = self._process(tensor, self._dequantised(tensor), merged)
            if done is not None:
                merged[name] = torch.from_numpy(np.array(done))
        if name not in merged or merged[name].shape != into.shape:
            raise self.file.damaged(f"{name} would have the shape {tuple(getattr(merged.get(name), 'shape', ()))}")
        into.copy_(merged[name])

    def _copy_rows(self, tensor: StoredTensor, into: Tensor) -> bool:
        """Dequantise a matrix some rows at a time; False where transformers does more to it than moving rows."""
        if tensor.shape != into.shape or (rows := self._rows(tensor)) is None:
            return False
        step = max(1, _CHUNK // tensor.shape[1])
        for start in range(0, len(rows), step):
            numbers = self._dequantised(tensor, rows[start : start + step])
            into[start : start + step].copy_(torch.from_numpy(numbers))
        return True

    def _dequantised(self, tensor: StoredTensor, rows: np.ndarray | None = None) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        raw, kind = self.file.raw(tensor), GGMLQuantizationType[tensor.kind]
        return dequantize(raw, kind).reshape(tensor.shape) if rows is None else dequantize(raw[rows], kind)

    def _rows(self, tensor: StoredTensor) -> np.ndarray | None:
        """Which row of the file each row of the model's matrix is; None where transformers does more than move rows."""
        if len(tensor.shape) != 2:
            return None
        numbers = np.arange(tensor.shape[0])[:, None]
        try:
            done = self._process(tensor, numbers, {})
        except ValueError:  # it moves parts of rows
            return None
        if done is None or done.shape != numbers.shape or not np.array_equal(np.sort(done, axis=0), numbers):
            return None
        return done[:, 0]

    def _process(self, tensor: StoredTensor, numbers: np.ndarray, merged: dict[str, Any]) -> np.ndarray | None:
        """What transformers makes of a tensor; None where it has put it into `merged`."""
        parsed = {"tensors": merged}
        options = {"tensor_key_mapping": self.names, "parsed_parameters": parsed}
        done = self.processor.process(weights=numbers, name=tensor.name, **options)
        return None if done.name is None else done.weights
