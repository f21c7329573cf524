"""The weights of a target's linear layers, dense, in panels or in blocks, and of its embeddings: what `weights=` asks
for, and views for those who read them. Knows nothing of files."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.block_linear import BlockLinear
from ..kernels.panel_linear import PanelLinear
from ..stream.rows import row_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Linear = nn.Linear | PanelLinear | BlockLinear  # and embeddings, whose weight is as dense
CHOICES = ("16", "q4", "q8", "q4-int8", "q8-int8")
READ_BY_LAYERS = ("dt_proj",)  # of Mamba-1, whose layers multiply with the weight instead of calling the linear layer


@dataclass(frozen=True, slots=True)
class Weights:
    """What `weights=` asks for."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in CHOICES:
            raise ValueError(f"weights={self.name!r} is none of {', '.join(CHOICES)}; 16 are the model's dense weights")

    @property
    def bits(self) -> int | None:
        """Of codes in blocks; None for dense weights."""
        return None if self.name == "16" else int(self.name[1])

    @property
    def int8_activations(self) -> bool:
        return self.name.endswith("-int8")


def may_be_packed(path: str, module: nn.Module) -> bool:
    """Whether a module at `path` is a linear layer that its model only calls, so that it need not have a weight."""
    return type(module) is nn.Linear and path.rpartition(".")[2] not in READ_BY_LAYERS


def is_in_blocks(layer: object) -> bool:
    return isinstance(layer, BlockLinear)


def is_packed(layer: object) -> bool:
    """Whether a linear layer has a `weight` without numbers, because it is in panels or in blocks."""
    return isinstance(layer, (BlockLinear, PanelLinear))


def linear_shape(layer: Linear) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    if isinstance(layer, (BlockLinear, PanelLinear)):
        return layer.out_features, layer.in_features
    outputs, inputs = layer.weight.shape
    return outputs, inputs


def dense_weight(layer: Linear, dtype: torch.dtype | None = None) -> Tensor:  # (N, K)
    """The weight of a linear layer, detached; one in blocks is dequantised, to float32 or `dtype`."""
    if isinstance(layer, PanelLinear):
        return layer.dense()
    if not isinstance(layer, BlockLinear):
        return layer.weight.detach()
    weight = layer.dequantised()
    return weight if dtype is None else weight.to(dtype)


def dense_rows(layer: Linear, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # (n,) -> (n, K)
    """Some rows of `dense_weight`, without making the others."""
    if isinstance(layer, PanelLinear):
        return layer.dense(rows)
    if not isinstance(layer, BlockLinear):
        return layer.weight.detach()[rows]
    weight = layer.dequantised(rows)
    return weight if dtype is None else weight.to(dtype)


def dense_parameters(layer: Linear) -> dict[str, Tensor]:
    """The parameters of a linear layer or of embeddings, detached. A weight in blocks is dequantised to float32, one on
    the disk is read."""
    found = {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}
    if (file := row_file(layer)) is not None:
        found["weight"] = file.rows(torch.arange(len(found["weight"]), device=found["weight"].device))
    return {"weight": dense_weight(layer), **found} if is_packed(layer) else found


def embedding_weight(model: "PreTrainedModel") -> Tensor:  # (V, H)
    """The weight of the embeddings, detached; where that is on the disk, all of it is read."""
    return dense_parameters(model.get_input_embeddings())["weight"]


def embedding_rows(model: "PreTrainedModel", rows: Tensor) -> Tensor:  # (n,) -> (n, H)
    """Some rows of `embedding_weight`."""
    embeddings = model.get_input_embeddings()
    file = row_file(embeddings)
    return embeddings.weight.detach()[rows] if file is None else file.rows(rows)


def head_weight(model: "PreTrainedModel") -> Tensor:  # (V, H)
    """The weight of the LM head in the model's dtype: where tied, that of the embeddings, on their memory."""
    head = model.get_output_embeddings()
    return embedding_weight(model) if _head_is_embeddings(model) else dense_weight(head, model.dtype)


def head_rows(model: "PreTrainedModel", rows: Tensor) -> Tensor:  # (n,) -> (n, H)
    """Some rows of `head_weight`."""
    head = model.get_output_embeddings()
    return embedding_rows(model, rows) if _head_is_embeddings(model) else dense_rows(head, rows, model.dtype)


def _head_is_embeddings(model: "PreTrainedModel") -> bool:
    """Whether the numbers of an LM head in blocks are those of the embeddings, which are dense."""
    return is_in_blocks(model.get_output_embeddings()) and model.config.get_text_config().tie_word_embeddings


def block_layers(model: nn.Module) -> dict[str, BlockLinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BlockLinear)}


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, with the dequantised weights of layers in blocks."""
    layers, state = block_layers(model), model.state_dict()
    owned = {f"{path}.{name}" for path, layer in layers.items() for name in layer.state_dict() if name != "bias"}
    dense = {name: tensor for name, tensor in state.items() if name not in owned}
    return dense | {f"{path}.weight": dense_weight(layer) for path, layer in layers.items()}


def weights_form(model: nn.Module) -> str:
    """In what blocks a model's layers are, such as "210 of 4 bits by 32"; empty for a dense model."""
    forms: Counter[str] = Counter()
    for layer in block_layers(model).values():
        forms[f"of {layer.bits} bits by {layer.group}" + " with int8 activations" * layer.int8_activations] += 1
    return ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))


def packed_layers(model: nn.Module) -> list[BlockLinear | PanelLinear]:
    """The linear layers in panels or in blocks."""
    return [layer for layer in model.modules() if isinstance(layer, (BlockLinear, PanelLinear))]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the weights: of parameters as they are, of panels and blocks as they are packed; those that are streamed
    count too."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total + sum(buffer.nbytes for layer in packed_layers(model) for buffer in layer.buffers())


def parameter_count(model: nn.Module) -> int:
    """The number of a model's parameters, those in panels and blocks too."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    return dense + sum(layer.out_features * layer.in_features for layer in packed_layers(model))


def refuse_saving(model: "PreTrainedModel") -> None:
    """`save_pretrained` of this model raises ValueError: it would leave out the layers in blocks, and those that are
    streamed."""
    model.save_pretrained = _no_saving


def refuse_casts(model: "PreTrainedModel") -> None:
    """No module of this model can be cast or moved (`to`, `float`, `half`, `cuda`): ValueError. Most of its weights are
    not there, and those that come are what was written of them."""
    for module in model.modules():
        module._apply = _no_casts


def _no_casts(*args: object, **options: object) -> NoReturn:
    raise ValueError(
        "a model that is streamed is of one dtype on one device and can be neither cast nor moved; load it anew as you "
        "want it"
    )


def _no_saving(*args: object, **options: object) -> NoReturn:
    raise ValueError(
        "a model with weights in blocks, or one that is streamed, cannot be saved by save_pretrained, which would "
        "leave them out; keep what it was loaded from, or save the model loaded with weights='16' and without stream="
    )
