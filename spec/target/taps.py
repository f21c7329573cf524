"""Taps: hidden states of a model, recorded by hooks at the LM head's input or at a decoder layer's output.

The LM head's input is the right state for every family: it comes after the final norm and any projection, and before
caps and scales of the logits (Gemma 2, Cohere), which do not change which token is first. Hooks are registered once per
module and record only inside `listening`; decoding and training use the same ones. Knows nothing of what the states are
for.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..recurrent.documents import Documents
from ..recurrent.hooks import reads_apart
from .weights import Linear, is_packed, linear_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD: Literal["head"] = "head"
NONE = slice(0)  # columns
Tap = int | Literal["head"]  # the output of the decoder layer of that number, from 0; or the LM head's input

_active = threading.local()
_putting = threading.Lock()  # two threads must not put the same tap twice


def linear_head(model: "PreTrainedModel") -> Linear:
    """The LM head, a linear map from the last hidden state to the logits, its weight dense or packed (weights.py
    reads both). Raises ValueError where there is none."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not is_packed(head) and not (isinstance(weight, Tensor) and weight.ndim == 2):
        raise ValueError(
            f"{type(model).__name__} has no linear LM head to take the last hidden state from; use a draft model or "
            "'ngram' as drafter"
        )
    return head


def layer_stacks(model: "PreTrainedModel") -> list[str]:
    """The paths of the module lists of `model` that are as long as it has decoder layers; usually one."""
    count = model.config.get_text_config().num_hidden_layers
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [path for path in lists if not any(path.startswith(f"{container}.") for container in lists)]
    return [path for path in outer if len(lists[path]) == count]


def _layer(model: "PreTrainedModel", number: int) -> nn.Module:
    stacks = layer_stacks(model)
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} is no plain stack of layers that could be tapped; use 'ngram'")
    layers = model.get_submodule(stacks[0])
    if not 0 <= number < len(layers):
        raise ValueError(f"{type(model).__name__} has no layer {number} to tap; it has layers 0 to {len(layers) - 1}")
    return layers[number]


def feature_sizes(model: "PreTrainedModel", taps: Iterable[Tap]) -> list[int]:
    """The size of each tap's hidden state."""
    hidden = model.config.get_text_config().hidden_size
    return [linear_shape(linear_head(model))[1] if tap == HEAD else hidden for tap in taps]


def put_taps(model: "PreTrainedModel", taps: Iterable[Tap]) -> None:
    """Register the hooks of `taps` on `model`. Raises ValueError where it has no such layer or LM head."""
    with _putting:
        for tap in taps:
            if tap == HEAD:
                head = linear_head(model)
                if not any(map(is_tap, head._forward_pre_hooks.values())):
                    head.register_forward_pre_hook(_tell_input)
                continue
            layer = _layer(model, tap)
            if not any(map(is_tap, layer._forward_hooks.values())):
                layer.register_forward_hook(partial(_tell_output, tap))


def put_idle_head(model: "PreTrainedModel") -> bool:
    """Let `listening` leave the LM head idle; False where it cannot."""
    try:
        put_taps(model, (HEAD,))
    except ValueError:
        return False
    return True


def put_module_tap(model: "PreTrainedModel", path: str) -> None:
    """Let `listening` record all that the module of `path` returns, under this path."""
    module = model.get_submodule(path)
    with _putting:
        if not any(map(is_tap, module._forward_hooks.values())):
            module.register_forward_hook(partial(_tell_all, path))


def is_tap(hook: object) -> bool:
    """Whether a module's hook is one of these taps, which do not change what the module computes."""
    return hook is _tell_input or (isinstance(hook, partial) and hook.func in (_tell_output, _tell_all))


def _tell_input(head: nn.Module, inputs: tuple) -> tuple | None:
    heard = getattr(_active, "heard", None)
    if heard is None:
        return None
    heard[HEAD] = inputs[0]
    return None if _active.columns is None else (inputs[0][:, _active.columns],)


def _tell_output(layer: int, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    heard = getattr(_active, "heard", None)
    if heard is not None:
        heard[layer] = output[0] if isinstance(output, tuple) else output


def _tell_all(path: str, module: nn.Module, inputs: tuple, output: Any) -> None:
    heard = getattr(_active, "heard", None)
    if heard is not None:
        heard[path] = output


@contextmanager
def listening(columns: slice | None = None) -> Iterator[dict[Tap | str, Any]]:
    """Within, the states at the taps of models run by this thread are recorded in the dict that is yielded, (B, n, H)
    each. A tapped LM head computes logits of the `columns` only; None: of all it is given."""
    _active.heard, _active.columns = {}, columns
    try:
        yield _active.heard
    finally:
        _active.heard = None


def joined(heard: Mapping[Any, Any], taps: tuple[Tap, ...]) -> Tensor:
    """Concatenate the states of `taps` to features (B, n, F). Raises ValueError where one was not recorded."""
    for tap in taps:
        if tap not in heard:
            missing = "its LM head" if tap == HEAD else f"its layer {tap}"
            raise ValueError(f"the model does not call {missing}, so its hidden states cannot be read; use 'ngram'")
    return heard[taps[0]] if len(taps) == 1 else torch.cat([heard[tap] for tap in taps], dim=-1)


def hidden_states(
    model: "PreTrainedModel", taps: tuple[Tap, ...], input_ids: Tensor, position_ids: Tensor, at_once: bool = False
) -> dict[Tap, Tensor]:
    """The hidden states at `taps`, (B, T, H) each, of packed rows (B, T), without computing logits.

    Documents of a pack do not see each other: without mask and cache, transformers builds a block mask from position
    ids that restart. Where layers keep states, each document is read in a row of its own, those of like lengths
    together; or `at_once`, as processes that share a model must all do as many forwards."""
    put_taps(model, (*taps, HEAD))
    if not reads_apart(model):
        return _heard(model, taps, input_ids, position_ids)
    documents = Documents(position_ids, at_once)
    read = [_heard(model, taps, *rows) for rows in zip(documents.apart(input_ids), documents.apart(position_ids))]
    return {tap: documents.packed([heard[tap] for heard in read]) for tap in taps}


def _heard(
    model: "PreTrainedModel", taps: tuple[Tap, ...], input_ids: Tensor, position_ids: Tensor
) -> dict[Tap, Tensor]:
    with listening(NONE) as heard:
        model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
    joined(heard, taps)  # raises where one is missing
    return {tap: heard[tap] for tap in taps}
