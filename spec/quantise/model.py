"""Quantising the linear layers of a model in place, one decoder layer after the other.

Each decoder layer is calibrated on what the layers before it, already quantised, make of the texts, so that it makes up
for their errors too. Decoder layers are found as the module list that is as long as the model has layers; embeddings,
norms and what is no `nn.Linear` stay as they are. Knows nothing of files, and of texts only their token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..kernels.block_linear import BlockLinear
from ..kernels.blocks import Blocks
from ..kernels.rotation import Rotation, random_rotation
from ..target.taps import layer_stacks
from ..target.weights import may_be_packed
from .descent import descend
from .gptq import Hessian, gptq
from .grid import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantised: the linears of its decoder layers and the LM head with bits of their own."""

    bits: int  # 4 or 8
    group: int
    head_bits: int = 8
    method: Literal["gptq", "nearest"] = "gptq"  # gptq: of rotated weights
    seed: int = 0  # of the rotations' signs


@dataclass(slots=True)
class _Call:
    """How a decoder layer is called for one text, but for its hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        made = layer(hidden, *self.args, **self.kwargs)
        return made[0] if isinstance(made, tuple) else made


@torch.no_grad()
def quantise_model(
    model: "PreTrainedModel",
    recipe: Recipe,
    texts: list[list[int]],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Replace the linear layers of `model` in its decoder layers, and its LM head, by `BlockLinear`s.

    `texts` are the token ids to calibrate on (`nearest` needs none); `progress` is called after each decoder layer with
    their number so far and in all. Raises ValueError as `check_model` does."""
    check_model(model, recipe)
    layers = _stack(model)
    calibrated = recipe.method == "gptq"
    hidden, calls = _recorded(model, layers, texts) if calibrated else ([], [])
    for number, layer in enumerate(layers):
        linears = _suitable(layer, recipe)
        alike = _hessians(layer, recipe, hidden, calls[number]) if calibrated else [([name], None) for name in linears]
        for names, hessian in alike:
            rotation = rotation_of(linears[names[0]].in_features, recipe) if calibrated else None
            made = _quantised([linears[name] for name in names], recipe.bits, recipe.group, hessian, rotation)
            for name, linear in zip(names, made):
                layer.set_submodule(name, linear)
        hidden = [call(layer, states) for call, states in zip(calls[number], hidden)] if calibrated else []
        progress(number + 1, len(layers))
    _quantise_head(model, recipe, texts)


def check_model(model: "PreTrainedModel", recipe: Recipe) -> None:
    """Raise ValueError for a model without a plain stack of layers, or without linear layers whose inputs are a
    multiple of the group."""
    if not any(_suitable(layer, recipe) for layer in _stack(model)):
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear with a multiple of {recipe.group} inputs in its decoder layers, "
            "so there is nothing to quantise; choose a smaller --group or another model"
        )


def _stack(model: "PreTrainedModel") -> nn.ModuleList:
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} is no plain stack of decoder layers, which is what can be quantised")
    stack = model.get_submodule(stacks[0])
    assert isinstance(stack, nn.ModuleList)
    return stack


def _suitable(layer: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """The linear layers of a decoder layer, by their paths in it, whose inputs fall into groups."""
    linears = {name: module for name, module in layer.named_modules() if may_be_packed(name, module)}
    return {name: linear for name, linear in linears.items() if linear.in_features % recipe.group == 0}


def _recorded(
    model: "PreTrainedModel", layers: nn.ModuleList, texts: list[list[int]]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """What the first layer gets for each text, (1, T, H), and how each layer is called: [layer][text]."""
    first: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in layers]
    rests: list[tuple | None] = [None] * len(layers)  # of a layer's outputs, where it makes several

    def stand_in(number: int, plain: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            """The layer itself for the first text; then it only passes its input on."""
            hidden = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                first.append(hidden)
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            calls[number].append(_Call(args[1:], named))
            if len(calls[number]) > 1:
                rest = rests[number]
                return hidden if rest is None else (hidden, *rest)
            made = plain(*args, **kwargs)
            rests[number] = made[1:] if isinstance(made, tuple) else None
            return made

        return forward

    own = [vars(layer).get("forward") for layer in layers]  # of a layer that was patched already
    try:
        for number, layer in enumerate(layers):
            layer.forward = stand_in(number, layer.forward)
        for text in texts:
            model.base_model(input_ids=torch.tensor([text], device=model.device), use_cache=False)  # without the head
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return first, calls


def _hessians(
    layer: nn.Module, recipe: Recipe, hidden: list[Tensor], calls: list[_Call]
) -> list[tuple[list[str], Hessian]]:
    """The names of a decoder layer's linears with the Hessian of their rotated inputs; those with the same input, as
    queries, keys and values have, come together."""
    linears = _suitable(layer, recipe)
    inputs: dict[str, Tensor] = {}
    first_of: dict[str, str] = {}  # the first linear with the same input
    hessians: dict[str, Hessian] = {}

    def watch(name: str) -> Callable:
        return lambda linear, args: inputs.update({name: args[0]})

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        for states, call in zip(hidden, calls):
            inputs.clear()
            call(layer, states)
            for name, x in inputs.items():
                first_of.setdefault(name, next(other for other, y in inputs.items() if y is x))
                if first_of[name] == name:
                    hessian = hessians.setdefault(name, Hessian(x.shape[-1]))
                    hessian.add(rotation_of(x.shape[-1], recipe).to(x.device)(x.float()))
    finally:
        for hook in hooks:
            hook.remove()
    never = [([name], Hessian(linear.in_features)) for name, linear in linears.items() if name not in first_of]
    return never + [([name for name in first_of if first_of[name] == first], hessians[first]) for first in hessians]


def rotation_of(inputs: int, recipe: Recipe) -> Rotation:
    """The rotation of all layers with so many inputs."""
    return random_rotation(inputs, recipe.seed + inputs)


def _quantised(
    linears: list[nn.Linear], bits: int, group: int, hessian: Hessian | None, rotation: Rotation | None
) -> list[BlockLinear]:
    """Linear layers with the same inputs in blocks: calibrated where there is a Hessian, of rotated weights where there
    is a rotation."""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    if rotation is not None:
        rotation = rotation.to(weight.device)
        weight = rotation(weight)
    blocks = nearest(weight, bits, group) if hessian is None else _calibrated(weight, hessian, bits, group)
    parts = blocks.split([linear.out_features for linear in linears])
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
    return [BlockLinear(part, bias, rotation=rotation) for part, bias in zip(parts, biases)]


def _calibrated(weight: Tensor, hessian: Hessian, bits: int, group: int) -> Blocks:
    """A weight (N, K) in blocks by GPTQ and, of 4 bits, coordinate descent; with 8 there is next to nothing to gain."""
    blocks = gptq(weight, hessian.factor().to(weight.device), bits, group)
    return blocks if bits == 8 else descend(weight, blocks, hessian.damped().float().to(weight.device))


def _quantise_head(model: "PreTrainedModel", recipe: Recipe, texts: list[list[int]]) -> None:
    """Of 8 bits the LM head is rounded to the nearest codes, at no cost that can be measured; of 4 bits it is
    calibrated. It is not rotated, so that drafters may use its rows. Embeddings that it is tied to stay as they are."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.in_features % recipe.group or recipe.head_bits == 16:
        return
    hessian = _head_hessian(model, head, texts) if recipe.method == "gptq" and recipe.head_bits < 8 else None
    [made] = _quantised([head], recipe.head_bits, recipe.group, hessian, None)
    model.set_output_embeddings(made)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _head_hessian(model: "PreTrainedModel", head: nn.Linear, texts: list[list[int]]) -> Hessian:
    hessian = Hessian(head.in_features)
    hook = head.register_forward_pre_hook(lambda linear, args: hessian.add(args[0]))
    try:
        for text in texts:
            model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    finally:
        hook.remove()
    return hessian
