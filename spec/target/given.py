"""Prompts that are more than token ids: images and other inputs of multimodal wrappers, embeddings, a cache.

The model's own forward reads such a prompt as in transformers' loop, into a cache of transformers. What this holds, the
logits behind the prompt and the features at the taps are handed to the slots of a target, where the text goes on. A
cache of the caller's is carried on: at the end it holds what transformers would have left in it. Knows nothing of
requests and steps.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..prompts import left_padding
from .taps import HEAD, Tap, joined, listening, put_taps

if TYPE_CHECKING:
    from .cache import SlotCache

CACHES = ("cache", "past_key_values")  # transformers' name for a cache: since 5.24, and before
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # keep keys and values of tokens, and nothing else
_EVERY_STEP = ("input_ids", "attention_mask", "position_ids", *CACHES)  # what each of transformers' forwards is given


@dataclass(frozen=True, slots=True, eq=False)
class GivenPrompt:
    """What a model's own forward made of prompts of `width` columns, padded on the left."""

    logits: Tensor  # (B, V) float32, behind the prompts
    features: Tensor | None  # (B, width, F), where there are taps; zeros where an earlier call has read
    cache: DynamicCache
    pads: Tensor  # (B,)
    shift: Tensor  # (B,): a token's position less its place in the text, which images change
    origin: DynamicCache | None = None  # the caller's own cache, of which `cache` is a copy

    @property
    def width(self) -> int:
        return self.cache.get_seq_length()

    def layers(self) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Keys and values (B, H, k, D) of the last k columns of each layer, None for a layer that keeps none."""
        return [(layer.keys, layer.values) if layer.is_initialized else None for layer in self.cache.layers]

    def features_at(self, positions: Tensor) -> Tensor | None:
        """The features (B, n, F) at `positions` (B, n) of the texts, anything where these are negative."""
        if self.features is None:
            return None
        columns = (positions + self.pads[:, None]).clamp(min=0)
        return self.features.gather(1, columns[..., None].expand(-1, -1, self.features.shape[2]))

    def carry_on(self, slots: "SlotCache", counts: list[int]) -> DynamicCache | None:
        """The caller's cache, which now holds the texts with their first `counts` new tokens too, the last of each left
        out; zeros behind texts that ended early. None where there is none."""
        if self.origin is None:
            return None
        new, begins = max(counts) - 1, (self.width - self.pads).tolist()
        for index, layer in enumerate(slots.layers):
            if new > 0 and layer.is_initialized:
                states = []
                for buffer in layer.buffers:
                    lines = layer.by_row(buffer).new_zeros(len(counts), new, buffer.shape[1])  # (B, new, H * D)
                    for row, (begin, count) in enumerate(zip(begins, counts)):
                        lines[row, : count - 1] = layer.by_row(buffer)[row, begin : begin + count - 1]
                    states.append(lines.unflatten(2, (layer.heads, -1)).transpose(1, 2))
                self.cache.update(*states, index)
        self.origin.layers = self.cache.layers
        return self.origin


def cache_name() -> str:
    """What transformers' `generate` calls a cache."""
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHES if name in parameters)


def check_cache(cache: Any) -> None:
    """Raise ValueError for a cache that cannot be carried on."""
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not plain or any(type(layer) not in _LAYERS for layer in cache.layers):
        kind = "n offloaded DynamicCache" if type(cache) is DynamicCache else f" {type(cache).__name__}"
        raise ValueError(
            f"the cache handed in is a{kind}, whose states a slot cache cannot take over; pass a "
            "transformers.DynamicCache of attention layers, or leave it out"
        )


@torch.no_grad()
def read_given(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, inputs: dict[str, Any], taps: tuple[Tap, ...]
) -> GivenPrompt:
    """Read prompts by the model's own forward, as transformers' loop does with its `input_ids` (B, k) and
    `model_kwargs`. Raises ValueError where later forwards could not go on from that with token ids alone."""
    name = cache_name()
    origin = inputs[name] if getattr(inputs[name], "_is_user_defined", False) else None
    if origin is not None:
        _check_continuation(origin, ids, config, inputs)
        inputs = {**inputs, name: _working_copy(origin)}
    if HEAD in taps:
        inputs["logits_to_keep"] = 0  # its states at all columns are heard; logits are computed for the last alone
    config.prefill_chunk_size = None
    put_taps(model, taps)
    with listening(columns=slice(-1, None)) as heard:
        outputs = model._prefill(ids, config, inputs)
    cache = inputs[name]
    mask = inputs.get("attention_mask")
    pads = ids.new_zeros(len(ids)) if mask is None else left_padding(mask.to(ids.device))
    _check_layers(model, cache)
    features = None
    if taps:
        features = joined(heard, taps)
        features = F.pad(features, (0, 0, cache.get_seq_length() - features.shape[1], 0))
    shift = _shift(model, ids, model._update_model_kwargs_for_generation(outputs, inputs), pads)
    return GivenPrompt(outputs.logits[:, -1].float(), features, cache, pads, shift, origin)


def _check_continuation(cache: DynamicCache, ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    mask, held = inputs.get("attention_mask"), cache.get_seq_length()
    width = getattr(config, "_mask_length", ids.shape[1]) if mask is None else mask.shape[1]
    if inputs.get("inputs_embeds") is not None:
        width = inputs["inputs_embeds"].shape[1]
    if held and width <= held:
        raise ValueError(
            f"the prompt has {width} tokens and the cache handed in already {held}; pass the whole text, or the new "
            "tokens with an attention_mask of the whole text"
        )


def _working_copy(cache: DynamicCache) -> DynamicCache:
    """A cache that shares the tensors of `cache`, which updates replace: a refusal leaves the caller's as it was."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _check_layers(model: PreTrainedModel, cache: DynamicCache) -> None:
    """Raise ValueError unless each layer holds the whole text, or the window of it that is still seen."""
    kept = [layer for layer in cache.layers if type(layer) not in _LAYERS or layer.is_initialized]
    plain = all(type(layer) in _LAYERS for layer in kept)
    for layer in kept:
        width = cache.get_seq_length() if plain else 0
        least = min(width, layer.sliding_window - 1) if plain and layer.is_sliding else width
        if not plain or not least <= layer.keys.shape[2] <= width:
            raise ValueError(
                f"{type(model).__name__} keeps something else of this prompt than keys and values of its tokens "
                "(states of a recurrence, perhaps, or of an image that every token looks at); use model.generate for it"
            )


def _shift(model: PreTrainedModel, ids: Tensor, inputs: dict[str, Any], pads: Tensor) -> Tensor:
    """How far the position of the next token is from its place in the text, (B,), by what transformers would hand the
    next forward. Raises ValueError where that is more than a token and its position."""
    name = cache_name()
    following = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)
    later = model.prepare_inputs_for_generation(following, next_sequence_length=1, **inputs)
    wrapped = model.config.get_text_config() is not model.config  # text is marked by zeros there
    for key, value in later.items():
        if isinstance(value, Tensor) and key not in _EVERY_STEP and not (wrapped and not value.any()):
            raise ValueError(
                f"{key} goes on into every later forward of {type(model).__name__}, which gets token ids only here; "
                "leave it out, or use model.generate"
            )
    positions = later.get("position_ids")
    if positions is None:
        return torch.zeros_like(pads)
    if positions.ndim == 2:
        positions = positions[None]
    if len(positions) == 4:  # the first are those of plain text, from which masks are made
        positions = positions[1:]
    last = positions[..., -1]  # (axes, B)
    if (last != last[0]).any():
        raise ValueError(
            f"{type(model).__name__} reads the end of this prompt as part of an image; let a token of text follow it"
        )
    return (last[0] - (inputs[name].get_seq_length() - pads)).expand(len(ids))
