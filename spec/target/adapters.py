"""PEFT adapters, such as LoRA: loading their folders, the model inside PEFT's wrapper, and which adapters are active.

An adapted model is the transformers model itself, with PEFT's layers inside; nothing else needs to know of them. Kept
steps and packed weights notice a switch by the attributes and weights of these layers. PEFT is optional.
"""

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..console import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_whole: "WeakKeyDictionary[nn.Module, set[str]]" = (
    WeakKeyDictionary()
)  # by wrapper: adapters that are all in its layers


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The model that an adapter folder is for. Raises ValueError where it does not say, or for another revision."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/{CONFIG} cannot be read ({error}); save the adapter again") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{folder}/{CONFIG} names no base_model_name_or_path; write there what model it adapts")
    if revision and not Path(base).is_dir():
        raise ValueError(
            f"adapter {folder} is for revision {revision} of {base}; fetch that into a folder, and name the folder as "
            f"base_model_name_or_path in {CONFIG}"
        )
    return base


def with_adapter(model: "PreTrainedModel", folder: str | Path) -> "PreTrainedModel":
    """`model`, its layers adapted by the weights in `folder`, under PEFT's name "default".

    Raises ValueError without PEFT, for weights that are missing, pickled or do not fit, and for adapters that are more
    than a part of a model's layers, such as tuned prompts."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{folder} is an adapter, which takes the package peft; install it: pip install peft")
    if not (Path(folder) / WEIGHTS).is_file():
        raise ValueError(
            f"adapter {folder} has no {WEIGHTS}; pickles are not read: save it with safe_serialization=True"
        )
    from peft import PeftModel

    _resize(model, Path(folder) / WEIGHTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapper = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # whatever PEFT raises for a source that does not fit
        detail = one_line(error, 100)
        raise ValueError(
            f"adapter {folder} does not fit {model.name_or_path or type(model).__name__} ({type(error).__name__}: "
            f"{detail}); see that it was made for this model"
        ) from error
    adapted = inside(wrapper.eval())
    adapted._hf_peft_config_loaded = True  # for transformers' own functions
    adapted.adapter_folder = str(folder)  # where its tokenizer may lie
    return adapted


def _resize(model: "PreTrainedModel", weights: Path) -> None:
    """Give `model` as many tokens as an adapter that brings embeddings or an LM head of its own."""
    from safetensors import safe_open

    layers = {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = {f"{path}." for path, module in model.named_modules() if id(module) in layers}
    with safe_open(str(weights), "pt") as file:
        shapes = [
            file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118 (it is no dict)
            if key.endswith("weight") and "lora_" not in key and any(name in key for name in names)
        ]
    rows = {shape[0] for shape in shapes if len(shape) == 2}
    if len(rows) == 1 and rows != {model.config.get_text_config().vocab_size}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def inside(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper; any other model itself.

    Raises ValueError for a wrapper that does more than its layers do."""
    if not hasattr(model, "get_base_model") or not hasattr(model, "active_adapter"):
        return model
    inner, active = model.get_base_model(), str(model.active_adapter)
    refuse_unfit(inner)
    known = _whole.setdefault(model, set())
    if active not in known:
        ids = torch.arange(1, 5, device=inner.device)[None]
        with torch.no_grad(), _without_dropout(model):
            outer, plain = (part(input_ids=ids, use_cache=False).logits for part in (model, inner))
        if outer.shape != plain.shape or not torch.allclose(outer, plain, atol=1e-4):
            raise ValueError(
                f"adapter {active!r} is more than a part of the model's layers (a tuned prompt, perhaps): its wrapper "
                "gives other logits than the model inside; use model.generate"
            )
        known.add(active)
    return inner


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refuse_unfit(model: nn.Module) -> None:
    """Raise ValueError for adapters that look at the whole prompt before they act on a token."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in ("XLORA", "POLY") or getattr(config, "alora_invocation_tokens", None):
            kind = "an activated LoRA" if kind == "LORA" else kind
            raise ValueError(
                f"adapter {name!r} is {kind}, which looks at the whole prompt before it acts on a token; merge it, or "
                "use model.generate"
            )


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any, list[str]]]:
    """Path and module of the layers that PEFT has adapted, and which of their adapters act, none where they are off."""
    for path, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
            yield path, module, [] if module.disable_adapters else list(module.active_adapters)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that act in `model`, sorted; none in a plain model, or where they are switched off."""
    return tuple(sorted({name for _, _, names in _adapted_layers(model) for name in names}))


def adapter_digest(model: nn.Module) -> bytes:
    """A digest of the adapters that act in `model`, whatever they are called: of a few rows of their weights in
    bfloat16, and of their scales. Empty where none does."""
    digest, acting = hashlib.sha256(), False
    for path, module, names in _adapted_layers(model):
        for name in names:
            for key, weight in _weights_of(module, name):
                acting = True
                rows = weight.detach().reshape(len(weight), -1) if weight.ndim else weight.detach().reshape(1, 1)
                sample = rows[torch.linspace(0, len(rows) - 1, 8).long().to(rows.device)].float().to(torch.bfloat16)
                digest.update(f"{path} {key} {tuple(weight.shape)}".encode())
                digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(str(getattr(module, "scaling", {}).get(name)).encode())
    return digest.digest() if acting else b""


def _weights_of(module: Any, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The weights that `adapter` has in a layer, in the parts that PEFT keeps by adapter."""
    for part in module.adapter_layer_names:
        kept = getattr(module, part, None)
        if isinstance(kept, (nn.ModuleDict, nn.ParameterDict)) and adapter in kept:
            held = kept[adapter]
            named = held.named_parameters() if isinstance(held, nn.Module) else [("", held)]
            yield from ((f"{part}.{key}", weight) for key, weight in named)
