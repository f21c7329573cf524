"""A drafter folder: `config.json`, `model.safetensors`, and optionally `acceptance.json` and `README.md`.

The config says what kind of drafter it is (`paceline_drafter`) and for which target it was made
(`paceline_target`: name and fingerprint). Nothing is unpickled. Knows no kind of drafter in particular.
"""

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..spec.console import one_line, quietly, waiting
from ..spec.files import whole
from ..spec.plan.trees import Rates
from ..spec.provenance import target_fingerprint
from ..spec.target.adapters import active_adapters
from ..spec.target.sources import check_hub_id
from .kinds import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def target_identity(model: "PreTrainedModel") -> dict[str, str]:
    """Name and fingerprint of a target, as in `paceline_target`. The name of a local folder has no path."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    name = Path(name).name if os.path.isabs(name) or Path(name).is_dir() else name
    name = "+".join([name, *(f"adapter {adapter}" for adapter in active_adapters(model))])
    return {"name": name, "fingerprint": target_fingerprint(model)}


@dataclass(frozen=True)
class DrafterFolder:
    """A folder whose config has been read."""

    path: Path
    config: dict

    @property
    def kind(self) -> str:
        return self.config["paceline_drafter"]

    def check_target(self, target: "PreTrainedModel") -> None:
        """Raise ValueError unless the drafter was made for `target`. A config without a target fits any."""
        expected, actual = self.config.get("paceline_target"), target_identity(target)
        if expected is not None and expected["fingerprint"] != actual["fingerprint"]:
            raise ValueError(
                f"drafter {self.path} was made for target {expected['name']!r} ({expected['fingerprint'][:12]}…) and "
                f"this target is {actual['name']!r} ({actual['fingerprint'][:12]}…); use a drafter made for it"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The weights. Raises ValueError where they are missing, damaged or pickled."""
        file = self.path / "model.safetensors"
        if not file.is_file():
            pickles = sorted(entry.name for entry in self.path.iterdir() if entry.suffix in PICKLES)
            if pickles:
                raise ValueError(
                    f"drafter {self.path} has no model.safetensors but {pickles[0]}, a pickle, which can run code; "
                    f"make a folder of it by paceline convert {self.path / pickles[0]} -o FOLDER"
                )
            raise ValueError(f"drafter {self.path} has no model.safetensors and so no weights; fetch it again")
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}); fetch the drafter again") from error

    def check_tensors(self, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Raise ValueError unless names and shapes are those of `expected` and all values are finite."""
        for name in sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"drafter {self.path} lacks the tensor {name!r}; fetch it again")
        for name in sorted(tensors.keys() - expected.keys()):
            raise ValueError(f"drafter {self.path} has a tensor {name!r} that its config has no place for")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(
                    f"drafter {self.path}: tensor {name!r} has shape {list(tensor.shape)} and its config asks for "
                    f"{list(expected[name].shape)}; fetch it again"
                )
            if not tensor.isfinite().all():
                raise ValueError(f"drafter {self.path}: tensor {name!r} holds NaN or infinite numbers; train it again")

    def rates(self) -> Rates | None:
        """The measured acceptance p[depth][rank] in `acceptance.json`; None without that file.

        Raises ValueError where it is damaged."""
        file = self.path / "acceptance.json"
        if not file.is_file():
            return None
        try:
            rates = json.loads(file.read_text(encoding="utf-8")).get("p")
            return rates and [[float(p) for p in row] for row in rates]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no record of acceptance ({error}); delete it or evaluate again") from error


def origin_of(folder: DrafterFolder) -> dict:
    """What a drafter that goes on from the one in `folder` records of it, as `paceline_start`."""
    digest = hashlib.sha256((folder.path / "model.safetensors").read_bytes()).hexdigest()
    return {"name": folder.path.name, "target": folder.config.get("paceline_target"), "sha256": digest}


def write_folder(folder: str | Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write weights, then config, each file atomically. A folder that lacks the config does not count as a drafter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "model.safetensors") as weights:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    with whole(folder / "config.json") as settings:
        settings.write_text(json.dumps({"paceline_format": FORMAT, **config}, indent=2) + "\n", encoding="utf-8")


def read_folder(name_or_path: str | Path) -> DrafterFolder | None:
    """The drafter folder at a path or of a hub id; None for anything else, such as an ordinary model.

    From the hub only JSON, safetensors and Markdown files of a drafter are fetched; for anything else only the config.
    Raises ValueError for a file other than a GGUF one, for a damaged config, and for an unknown kind or format."""
    path = Path(name_or_path)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return None
    if path.is_file():
        if path.suffix in PICKLES:
            raise ValueError(
                f"drafter {path} is a pickle, which can run code; make a folder of it by paceline convert {path} "
                "-o FOLDER"
            )
        raise ValueError(f"drafter {path} is a file; give a folder with config.json and model.safetensors")
    config = _config(str(name_or_path))
    if "paceline_drafter" not in config:
        return None
    target = config.get("paceline_target")
    if not isinstance(config.get("paceline_format", FORMAT), int) or not (
        target is None or (isinstance(target, dict) and {"name", "fingerprint"} <= target.keys())
    ):
        raise ValueError(f"the config.json of drafter {name_or_path} is damaged; fetch or train it again")
    if config.get("paceline_format", FORMAT) > FORMAT:
        raise ValueError(
            f"drafter {name_or_path} has format {config['paceline_format']} and this version knows {FORMAT}; upgrade"
        )
    known = [name for name, kind in KINDS.items() if kind.weights]
    if config["paceline_drafter"] not in known:
        raise ValueError(
            f"drafter {name_or_path} is of a kind {config['paceline_drafter']!r} and this version knows "
            f"{', '.join(known)}; upgrade"
        )
    return DrafterFolder(path if path.is_dir() else fetch(str(name_or_path)), config)


def fetch(name: str) -> Path:
    """The folder of a hub id, of which JSON, safetensors and Markdown are fetched. Raises ValueError where the model
    hub does not give it."""
    from huggingface_hub import snapshot_download

    try:
        with waiting(f"fetching {name} from the model hub"), quietly():
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # whatever the hub raises
        raise ValueError(
            f"drafter {name!r} could not be fetched from the model hub ({type(error).__name__}: {one_line(error)}); "
            "check the network"
        ) from error


def _config(name: str) -> dict:
    """The config of a folder or hub id, found and cached by transformers; empty for a folder without one.

    Raises ValueError for any other name that the model hub does not know."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import PreTrainedConfig

    folder = Path(name).is_dir()
    if not folder:
        check_hub_id("drafter", name)
    try:
        here = folder or isinstance(try_to_load_from_cache(name, "config.json"), str)
        with nullcontext() if here else waiting(f"looking for {name} on the model hub"), quietly():
            return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError) as error:
        if folder:
            return {}  # loading the model will say what is wrong
        without_weights = " and ".join(kind for kind, about in KINDS.items() if not about.weights)
        raise ValueError(
            f"drafter {name!r} is no folder here and the model hub did not give it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}); choose {without_weights}, one that `paceline drafters` lists, or "
            "check name and network"
        ) from error
