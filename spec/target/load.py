"""Loading models: from a local folder, a GGUF file or the model hub, and those that `NAMED` lists from a PyPI wheel
too. Knows nothing of decoding.
"""

import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .weights import Weights

from ..console import quietly, waiting
from .sources import resolve, why_not_loaded
from .tokenizers import load_tokenizer
from .wheels import NAMED

LARGE = 2e9  # bytes of weights from which loading them takes a while


def load_target(
    name_or_path: str | Path,
    dtype: "str | torch.dtype" = "auto",
    device: "str | int | torch.device | None" = None,
    trust_remote_code: bool = False,
    with_tokenizer: bool = True,
    weights: str = "16",
    stream: str | None = None,
    resident: str | int | float | None = None,
) -> tuple["PreTrainedModel", Any]:
    """Load a causal LM in evaluation mode and its tokenizer: (model, tokenizer).

    `name_or_path` is a folder, a GGUF file, a name from `paceline models`, a hub id, or a hub id and the name of a GGUF
    file there, `owner/name/file.gguf`; the folder or hub id of a PEFT adapter gives its base model, adapted.
    `dtype` is a torch dtype or its name ("auto" is the checkpoint's own, but float32 for bfloat16 on a CPU that only
    emulates it, which is several times slower). Without `with_tokenizer` the tokenizer is None. Remote code runs only
    with `trust_remote_code=True`.

    `weights` are "16", dense ones; "q4" or "q8", the blocks of a quantised model as they are; or "q4-int8" or
    "q8-int8", in whose products activations are rounded to 8 bits, which is faster and changes the text a little.

    With `stream` the weights of decoder layers are fetched during each forward: from "disk", to a CPU, or to a GPU from
    the memory of its "host". `resident` is how much of the weights may be in the memory of the device, such as "8GB"
    or a number of bytes; None allows half of what is free there. Weights are repacked for it once, in the cache folder.

    Raises ValueError, in one sentence, where nothing can be loaded.
    """
    from ..quantise.folder import is_quantised, load_quantised
    from .adapters import is_adapter
    from .weights import Weights

    wanted = Weights(str(weights))
    dtype, placed = _checked_dtype(dtype), _placed(device)
    name, where = str(name_or_path), resolve(str(name_or_path), in_blocks=wanted.bits is not None)
    if stream is not None:
        return _load_streamed(name, where, wanted, dtype, placed, trust_remote_code, with_tokenizer, stream, resident)
    if resident is not None:
        raise ValueError(
            f"resident={resident!r} is for a model that is streamed; pass stream= as well, or leave it out"
        )
    if is_adapter(where := _adapter_folder(where)):
        return _load_adapted(where, wanted, dtype, placed, trust_remote_code, with_tokenizer)
    if Path(where).is_file():
        model, tokenizer = _load_gguf(name, where, wanted, dtype, placed, with_tokenizer)
        if name in NAMED:
            model.config._name_or_path = model.name_or_path = NAMED[name].hub_id
        return model, tokenizer
    if is_quantised(where):
        return load_quantised(where, wanted, dtype, placed, with_tokenizer, trust_remote_code)
    if wanted.bits:
        raise ValueError(
            f"weights={weights!r}: {where} holds no weights in blocks; name a GGUF file, make a folder by paceline "
            "quantise, or load it with weights='16'"
        )
    return _load_dense(name, where, dtype, device, trust_remote_code, with_tokenizer)


def _checked_dtype(dtype: "str | torch.dtype") -> "str | torch.dtype":
    """`dtype` as torch's, or "auto"."""
    import torch

    if dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point dtype of torch; use 'auto', 'float32' or 'bfloat16'")
    return found


def _placed(device: "str | int | torch.device | None") -> "torch.device":
    """The device that is meant, with its number; None means torch's default one."""
    import torch

    try:
        placed = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    if placed.type == "meta":
        raise ValueError("device='meta' keeps no numbers to decode with; use 'cpu' or 'cuda'")
    return placed


def _load_dense(
    name: str,
    where: str,
    dtype: "str | torch.dtype",
    device: "str | int | torch.device | None",
    trust_remote_code: bool,
    with_tokenizer: bool,
) -> tuple["PreTrainedModel", Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..kernels.cpu import computed_in

    options = {"trust_remote_code": trust_remote_code}
    try:
        with _wait(name, where), quietly():
            model, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(where, **options) if with_tokenizer else None
    except Exception as error:  # whatever transformers, safetensors or the hub raise for a bad source
        raise ValueError(why_not_loaded(name, where, error)) from error
    absent = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if absent:  # transformers would fill them with random numbers
        raise ValueError(f"the weights of {where} lack {absent[0]} and {len(absent) - 1} more; fetch the model again")
    model = model.to(device or model.device)
    if dtype == "auto" and (wide := computed_in(model.dtype, model.device)) != model.dtype:
        model = model.to(wide)
    return model.eval(), tokenizer


def _adapter_folder(where: str) -> str:
    """The folder of an adapter on the model hub, of which JSON and safetensors are fetched; any other name itself."""
    if Path(where).exists():
        return where
    from huggingface_hub import snapshot_download
    from transformers.utils import find_adapter_config_file

    with suppress(OSError, ValueError), quietly():  # what cannot be found is told by who loads it
        if find_adapter_config_file(where):
            return snapshot_download(where, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    return where


def _load_adapted(
    folder: str,
    wanted: "Weights",
    dtype: "str | torch.dtype",
    device: "torch.device",
    trust_remote_code: bool,
    with_tokenizer: bool,
) -> tuple["PreTrainedModel", Any]:
    from .adapters import base_of, with_adapter

    base = base_of(folder)
    if wanted.bits:
        raise ValueError(
            f"adapter {folder} is of dense layers, and weights={wanted.name!r} are in blocks; load it with 16"
        )
    try:
        model, _ = load_target(base, dtype, device, trust_remote_code, with_tokenizer=False)
    except ValueError as error:
        raise ValueError(f"adapter {folder} is for base model {base!r}, which cannot be loaded: {error}") from error
    tokenizer = load_tokenizer(folder, trust_remote_code) if with_tokenizer else None
    return with_adapter(model, folder), tokenizer


def _load_streamed(
    name: str,
    where: str,
    weights: "Weights",
    dtype: "str | torch.dtype",
    device: "torch.device",
    trust_remote_code: bool,
    with_tokenizer: bool,
    stream: str,
    resident: str | int | float | None,
) -> tuple["PreTrainedModel", Any]:
    from ..stream.load import checked_kind, load_streamed
    from ..stream.origin import Asked
    from .adapters import is_adapter

    kind = checked_kind(stream, device)
    if is_adapter(where := _adapter_folder(where)):
        raise ValueError(
            f"{where} is an adapter, which cannot be streamed; merge it (merge_and_unload, save_pretrained) and stream "
            "the folder"
        )
    try:
        with quietly():
            asked = Asked(_local(where, name), weights, dtype, device, trust_remote_code)
            model, tokenizer = load_streamed(asked, kind, resident, name, with_tokenizer)
    except ValueError:
        raise
    except Exception as error:  # whatever transformers, safetensors or the hub raise for a bad source
        raise ValueError(why_not_loaded(name, where, error)) from error
    if name in NAMED:
        model.config._name_or_path = model.name_or_path = NAMED[name].hub_id
    return model, tokenizer


def _local(where: str, name: str) -> str:
    """A folder or file here; a hub id is fetched."""
    if Path(where).exists():
        return where
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    twice = ["consolidated*.safetensors"]  # the same weights in one file, as Mistral's own code reads them
    with waiting(f"fetching {name} from the model hub"):
        return snapshot_download(where, allow_patterns=kinds, ignore_patterns=twice)


def _load_gguf(
    name: str,
    where: str,
    weights: "Weights",
    dtype: "str | torch.dtype",
    device: "torch.device",
    with_tokenizer: bool,
) -> tuple["PreTrainedModel", Any]:
    from ..kernels.cpu import computed_in
    from .gguf_file import opened
    from .gguf_model import gguf_model, gguf_tokenizer, own_dtype

    with opened(where) as file, _wait(where, where), quietly():
        if isinstance(dtype, str):
            dtype = computed_in(own_dtype(file), device)
        model, told = gguf_model(file, weights, dtype, device)
        tokenizer = gguf_tokenizer(file) if with_tokenizer else None
    if weights.bits:
        print(f"{Path(name).name}: {told}", file=sys.stderr)
    return model, tokenizer


def _wait(name: str, where: str) -> AbstractContextManager[None]:
    """A line for a download and for large weights; nothing for what is here in a moment."""
    folder = Path(where)
    if folder.is_file():
        size = folder.stat().st_size
        return waiting(f"loading {folder.name}, {size / 1e9:.0f} GB") if size > LARGE else nullcontext()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(where, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
        if not any(folder.glob("*.safetensors")):
            return waiting(f"fetching {name} from the model hub")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return waiting(f"loading {name}, {size / 1e9:.0f} GB") if size > LARGE else nullcontext()


def end_ids(model: "PreTrainedModel") -> list[int]:
    """The ids that end a text of `model`, by its own generation config."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def context_length(model: "PreTrainedModel") -> int | None:
    """The context of `model` in tokens; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
