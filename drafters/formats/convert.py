"""The command `paceline convert`: a pickled drafter as a folder with safetensors.

The pickle is read in a process of its own (unpickle.py), which takes tensors alone. Knows no format.
"""

import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from safetensors import safe_open

from ...spec.console import waiting
from ...spec.files import check_absent, new_folder, write_json
from ..folder import PICKLES
from .checkpoint import INDEX, WEIGHTS, open_checkpoints, shards_of
from .detect import detect
from .unpickle import REFUSED

_INDEX = ".index.json"  # of weights in several files


def convert(args: Namespace) -> None:
    """`paceline convert`. Raises ValueError for what is no pickle of tensors with a config beside it."""
    file, output = Path(args.file), Path(args.output)
    check_absent(output)
    config = _config_beside(file)
    with new_folder(output) as work:
        with waiting(f"reading {file.name}"):
            _unpickle_all(_pickles(file), work)
        shutil.copyfile(config, work / "config.json")
        (made,) = open_checkpoints(work)
        form = detect(made.config(), made.files)
    kind = f", in the format {form}" if form else ""
    print(
        f"{output} has the {len(made.files)} tensors of {file.name} as safetensors{kind}; use it by --drafter {output}"
    )


def _config_beside(file: Path) -> Path:
    """The config.json beside a pickle. Raises ValueError where either is missing, or not what it should be."""
    if not file.is_file():
        raise ValueError(f"{file} is no file here; give a drafter's weights, such as pytorch_model.bin")
    if Path(file.name.removesuffix(_INDEX)).suffix not in PICKLES:
        raise ValueError(f"{file} is none of {', '.join(PICKLES)}; folders with safetensors are read as they are")
    config = file.with_name("config.json")
    if not config.is_file():
        raise ValueError(f"{file} has no config.json beside it, which a drafter needs; fetch it too")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config} is no JSON file ({error}); fetch it again") from error
    if not isinstance(read, dict):
        raise ValueError(f"{config} holds no JSON object; fetch it again")
    return config


def _pickles(file: Path) -> list[Path]:
    """The files that an index names; else the file itself. Raises ValueError where one is missing, or is none."""
    if not file.name.endswith(_INDEX):
        return [file]
    parts = [file.with_name(part) for part in sorted(shards_of(file))]
    for part in parts:
        if part.suffix not in PICKLES or not part.is_file():
            raise ValueError(f"{file} names {part.name}, which is no pickle here; fetch it too")
    return parts


def _unpickle_all(files: list[Path], folder: Path) -> None:
    """Write the tensors of pickles as `save_pretrained` would. Raises ValueError for a tensor that two of them have."""
    if len(files) == 1:
        _unpickle(files[0], folder / WEIGHTS)
        return
    inside: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        _unpickle(file, folder / shard)
        with safe_open(folder / shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if inside.setdefault(name, shard) != shard:
                    raise ValueError(
                        f"{file} is not converted: another file has its tensor {name!r} too; fetch both again"
                    )
    write_json(folder / INDEX, {"metadata": {}, "weight_map": inside})


def _unpickle(file: Path, output: Path) -> None:
    script = Path(__file__).with_name("unpickle.py")
    done = subprocess.run(
        [sys.executable, "-P", script, file, output], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return
    if done.returncode == REFUSED:
        raise ValueError(f"{file} is not converted: {done.stdout.strip()}")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError(f"{file} is not converted: the process that read it was ended by {name}; is memory short?")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
    raise ValueError(f"{file} is not converted: the process that read it failed ({last}); fetch the file again")
