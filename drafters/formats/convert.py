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

from ...spec.console import waiting
from ...spec.files import check_absent, new_folder
from ..folder import PICKLES
from .checkpoint import WEIGHTS, open_checkpoints
from .detect import detect
from .unpickle import REFUSED


def convert(args: Namespace) -> None:
    """`paceline convert`. Raises ValueError for what is no pickle of tensors with a config beside it."""
    file, output = Path(args.file), Path(args.output)
    check_absent(output)
    config = _config_beside(file)
    with new_folder(output) as work:
        with waiting(f"reading {file.name}"):
            _unpickle(file, work / WEIGHTS)
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
    if file.suffix not in PICKLES:
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
