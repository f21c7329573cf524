"""The folder of a quantised model: safetensors and JSON, read back to the same bits.

    config.json            transformers' own, and a section `quantisation`: how it was made, and each layer's form
    quantised.safetensors  LAYER.codes (N, K / 2) or (N, K) uint8, LAYER.scales (N, K / group) float16, LAYER.offsets
                           alike where there are any, signs.K (K,) int8, and all else under transformers' names
    generation_config.json, the tokenizer's files, README.md and quality.json

Two codes of 4 bits share a byte, the first of them in its low half. The file is not named as transformers expects,
which would fill the missing weights with random numbers. Knows nothing of how a model is quantised.
"""

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..console import one_line
from ..kernels.block_linear import BlockLinear
from ..kernels.blocks import GROUPS, Blocks
from ..kernels.cpu import computed_in
from ..kernels.rotation import Rotation
from ..target.weights import Weights, may_be_packed, refuse_saving

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SECTION = "quantisation"  # of config.json
FORMAT = 1
WEIGHTS = "quantised.safetensors"


def write_model(model: "PreTrainedModel", tokenizer: Any, folder: Path, about: dict) -> None:
    """Write a model with `BlockLinear`s and its tokenizer to `folder`; `about` goes into config.json."""
    layers, tensors = {}, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, layer in _block_layers(model).items():
        blocks, rotation = layer.blocks, layer.rotation
        has_offsets = blocks.offsets is not None
        form = {"bits": blocks.bits, "group": blocks.group, "offsets": has_offsets}
        layers[name] = {**form, "rotation": rotation and rotation.block}
        tensors.pop(f"{name}.packed", None)  # the same blocks in the form of this processor
        tensors[f"{name}.codes"] = packed(blocks.codes) if blocks.bits == 4 else blocks.codes
        tensors[f"{name}.scales"] = blocks.scales
        if has_offsets:
            tensors[f"{name}.offsets"] = blocks.offsets
        if rotation is not None:
            tensors[f"signs.{layer.in_features}"] = rotation.signs
    for name in _tied(model, tensors):
        del tensors[name]
    dtype = smallest_dtype(model)
    for name in model.state_dict().keys() & tensors.keys():
        tensors[name] = tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name]
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = model.config.to_dict() | {SECTION: {"format": FORMAT, **about, "layers": layers}}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smallest_dtype(model: nn.Module) -> torch.dtype:
    """The smallest dtype that holds all parameters as they are: a checkpoint of 16 bits may be loaded in float32."""
    numbers = [parameter.detach() for parameter in model.parameters()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(number.to(dtype).to(number.dtype), number) for number in numbers):
            return dtype
    return torch.float32


def _block_layers(model: nn.Module) -> dict[str, BlockLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BlockLinear)}


def _tied(model: "PreTrainedModel", tensors: dict[str, Tensor]) -> list[str]:
    """Names of weights that share their memory with one before them: a head that is still tied to the embeddings."""
    seen: set[tuple] = set()
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in tensors.items() if tensor.numel()}
    return [name for name, place in places.items() if place in seen or seen.add(place)]  # type: ignore[func-returns-value]


def packed(codes: Tensor) -> Tensor:  # (N, K) of 4 bits -> (N, K / 2)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpacked(codes: Tensor) -> Tensor:  # (N, K / 2) -> (N, K)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)


def is_quantised(folder: str | Path) -> bool:
    """Whether `folder` is the folder of a quantised model."""
    return (Path(folder) / WEIGHTS).is_file()


def load_quantised(
    folder: str | Path,
    weights: Weights | None = None,
    dtype: "str | torch.dtype" = "auto",
    device: "str | int | torch.device | None" = None,
    with_tokenizer: bool = True,
    trust_remote_code: bool = False,
) -> tuple["PreTrainedModel", Any]:
    """The model of a quantised folder, in evaluation mode, and its tokenizer, as by `load_target`. What is not in
    blocks is in `dtype`, and so are the activations; `weights` may ask for the folder's own bits, and for activations
    of 8 bits.

    Raises ValueError, in one sentence, for a folder that is damaged or was made by another version."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        layers = checked_layers(folder, config, weights or Weights("16"))
        if isinstance(dtype, str):
            dtype = computed_in(config.dtype, torch.empty(0, device=device).device)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        options = {"trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options) if with_tokenizer else None
        tensors = dict(FileTensors(folder / WEIGHTS))
    except (OSError, KeyError, SafetensorError, RuntimeError) as error:
        detail = one_line(error)
        raise ValueError(f"quantised model {folder} cannot be loaded ({detail}); {REMEDY}") from error
    _put_blocks(folder, model, layers, tensors, weights is not None and weights.int8_activations)
    _put_rest(folder, model, tensors)
    for parameter in model.parameters():  # not the buffers: frequencies of rotary embeddings stay in float32
        parameter.data = parameter.data.to(dtype)
    refuse_saving(model)
    return model.to(device or "cpu").eval(), tokenizer


REMEDY = "copy it again or make it anew by paceline quantise"


class FileTensors(MutableMapping):
    """The tensors of a file of safetensors, read when they are asked for; those that are taken out are only taken off
    the list."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a matrix."""
        return self._read(name, slice(start, stop))

    def _read(self, name: str, part: slice) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name)[part] if part != slice(None) else file.get_tensor(name)

    def __delitem__(self, name: str) -> None:
        del self._names[name]

    def __setitem__(self, name: str, tensor: Tensor) -> NoReturn:
        raise TypeError("a file is only read")

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._names))

    def __len__(self) -> int:
        return len(self._names)


def checked_layers(folder: Path, config: "PreTrainedConfig", weights: Weights) -> dict[str, dict]:
    """The layers in blocks of a folder, and their forms. Raises ValueError for what this version does not understand,
    and for other bits than `weights` ask for."""
    layers = _listed(folder, getattr(config, SECTION, None))
    least = min((layer["bits"] for layer in layers.values()), default=weights.bits)
    if weights.bits not in (None, least):
        raise ValueError(f"weights={weights.name!r}: {folder} holds weights of {least} bits; ask for those or for none")
    return layers


def _listed(folder: Path, about: Any) -> dict[str, dict]:
    """The layers in a section `about`, and their forms. Raises ValueError for what this version does not understand."""
    if not isinstance(about, dict) or not isinstance(about.get("layers"), dict):
        raise ValueError(f"{folder}/config.json has no section {SECTION!r} with layers; {REMEDY}")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder} is of format {about.get('format')!r} and this version reads {FORMAT}; update paceline"
        )
    for name, layer in about["layers"].items():
        if not _is_form(layer):
            raise ValueError(f"{folder}/config.json: layer {name} has the form {layer!r}, which is none; {REMEDY}")
    return about["layers"]


def _is_form(layer: Any) -> bool:
    if not isinstance(layer, dict) or layer.keys() != {"bits", "group", "offsets", "rotation"}:
        return False
    block = layer["rotation"]
    rotated = type(block) is int and block > 0 and block & (block - 1) == 0
    return layer["bits"] in (4, 8) and layer["group"] in GROUPS and (block is None or rotated)


def _put_blocks(
    folder: Path, model: "PreTrainedModel", layers: dict, tensors: dict[str, Tensor], int8_activations: bool
) -> None:
    """Replace the layers that config.json lists by `BlockLinear`s, with their tensors taken out of `tensors`."""
    rotations: dict[tuple[int, int], Rotation] = {}  # shared, so that a compiler sees that they are the same
    linears = {name: module for name, module in model.named_modules() if may_be_packed(name, module)}
    for name, form in layers.items():
        if name not in linears:
            raise ValueError(
                f"{folder}/config.json lists {name}, which is no linear layer that can be in blocks; {REMEDY}"
            )
        made = block_layer(folder, name, form, linears[name], tensors, int8_activations, rotations)
        made.bias = linears[name].bias  # still empty, and filled like all that is not in blocks
        model.set_submodule(name, made)
    for inputs, _ in rotations:
        tensors.pop(f"signs.{inputs}", None)


def block_layer(
    folder: Path,
    name: str,
    form: dict,
    linear: nn.Linear,
    tensors: MutableMapping[str, Tensor],
    int8_activations: bool,
    rotations: dict[tuple[int, int], Rotation],
) -> BlockLinear:
    """The layer of a form in place of `linear`, without its bias; its tensors are taken out of `tensors`. `rotations`
    are those made so far. Raises ValueError for tensors that are missing or do not fit."""
    outputs, inputs = linear.weight.shape
    bits, group, block = form["bits"], form["group"], form["rotation"]
    if inputs % group or inputs % (block or 1):
        raise ValueError(f"{folder}/config.json: {name} has {inputs} inputs, no multiple of {form}; {REMEDY}")
    codes = _taken(folder, tensors, f"{name}.codes", torch.uint8, (outputs, inputs * bits // 8))
    scales = _finite(folder, tensors, f"{name}.scales", (outputs, inputs // group))
    offsets = _finite(folder, tensors, f"{name}.offsets", tuple(scales.shape)) if form["offsets"] else None
    if block is not None and (inputs, block) not in rotations:
        signs = _checked(folder, tensors, f"signs.{inputs}", torch.int8, (inputs,))
        if not (signs.abs() == 1).all():
            raise ValueError(f"{folder}/{WEIGHTS}: signs.{inputs} holds numbers other than 1 and -1; {REMEDY}")
        rotations[inputs, block] = Rotation(signs, block)
    blocks = Blocks(unpacked(codes) if bits == 4 else codes, scales, offsets, 1 << (bits - 1), bits)
    return BlockLinear(blocks, None, int8_activations, rotations.get((inputs, block)))


def _finite(folder: Path, tensors: MutableMapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The scales or offsets of this name, taken out."""
    made = _taken(folder, tensors, name, torch.float16, shape)
    if not made.isfinite().all():
        raise ValueError(f"{folder}/{WEIGHTS}: {name} holds NaN or infinite numbers; {REMEDY}")
    return made


def _taken(
    folder: Path, tensors: MutableMapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    made = _checked(folder, tensors, name, dtype, shape)
    del tensors[name]
    return made


def _checked(
    folder: Path, tensors: MutableMapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor `name`; raises ValueError where it is missing, or of another dtype or shape."""
    made = tensors.get(name)
    if made is None or made.dtype != dtype or tuple(made.shape) != shape:
        has = "missing" if made is None else f"{made.dtype} {tuple(made.shape)}"
        raise ValueError(f"{folder}/{WEIGHTS}: {name} is {has} and should be {dtype} {shape}; {REMEDY}")
    return made


def _put_rest(folder: Path, model: "PreTrainedModel", tensors: dict[str, Tensor]) -> None:
    """Fill all parameters and buffers that are not in blocks; `tensors` may hold nothing else."""
    try:
        left = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        detail = one_line(error)
        raise ValueError(f"{folder}/{WEIGHTS} does not fit the model in config.json ({detail}); {REMEDY}") from error
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or left.unexpected_keys:
        wrong = f"lacks {empty[0]}" if empty else f"holds {left.unexpected_keys[0]}, which the model has not"
        raise ValueError(f"{folder}/{WEIGHTS} {wrong}; {REMEDY}")
