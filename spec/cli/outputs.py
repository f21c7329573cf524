"""What a command reads and writes, looked at before it loads anything.

An option says by its type what its value names: an `Input`, or a kind of `Output`. `check_files` refuses outputs that
cannot be written, that the command reads too, and that are one file by several names. Knows no command.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from ..files import check_writable

# What loaders read of the folder of a model, a drafter or data.
_READ = (
    "*.safetensors", "*.index.json", "*.gguf", "*.arrow", "*.model", "*.py", "*.jinja", "*.sha256", "*config.json",
    "*token*.json", "vocab*", "merges*", "acceptance.json", "training.json", "paceline.json", "state.json",
    "dataset_*.json",
)  # fmt: skip


class Input(str):
    """What is read: a file, a folder, or a name that is neither."""

    def names(self) -> list[str]:
        return [self]


class DrafterInput(Input):
    """A drafter, or two with a plus between."""

    def names(self) -> list[str]:
        return [self, *self.split("+")]


class Output(str):
    """A file that is written whole."""

    stream = False  # "-" is standard output, and a pipe or a device will do
    appended = False  # what is in the file stays
    makes_folders = False  # above it, where they are missing
    endings: tuple[str, ...] = ()  # of files that belong to it and are written beside it

    def paths(self) -> list[Path]:
        """The files that are written."""
        if self.stream and self == "-":
            return []
        return [Path(self), *(companion(self, ending) for ending in self.endings)]

    def check(self) -> None:
        """Raise ValueError where it cannot be written."""
        if self in ("", "-") and self.paths():
            raise ValueError(f"{str(self)!r} names no file; give the output a name")
        self.check_kind()
        for path in self.paths():
            check_writable(path, self.appended, self.makes_folders)

    def check_kind(self) -> None:
        if os.path.isdir(self):
            raise ValueError(f"{self} is a folder and the output is a file; give a name in it")
        if os.path.exists(self) and not os.path.isfile(self) and not self.stream:
            raise ValueError(f"{self} is no ordinary file; give another place")


class StreamedOutput(Output):
    """A text that may go to standard output."""

    stream = True


class AppendedOutput(Output):
    """A file that grows."""

    appended = True


class OutputFolder(Output):
    """A folder that is made."""

    makes_folders = True

    def check_kind(self) -> None:
        if os.path.exists(self) and not os.path.isdir(self):
            raise ValueError(f"{self} is a file and the output is a folder; give another place")


def companion(path: str | Path, ending: str) -> Path:
    """The file with that ending that belongs to `path`: answers.run.json to answers.jsonl, and answers.v2.run.json to
    answers.v2."""
    path = Path(path)
    return path.parent / (path.name.removesuffix(".jsonl") + ending)


def check_files(values: Iterable[object]) -> None:
    """Raise ValueError for outputs among the `values` of a command's options, or in lists of them, that cannot be
    written, that are read as well, or that are one file. Nothing is left of looking."""
    given = [item for value in values for item in (value if isinstance(value, list) else [value])]
    outputs = [item for item in given if isinstance(item, Output)]
    if sum(output == "-" for output in outputs) > 1:
        raise ValueError("- is named for two outputs, which would be mixed; write one of them to a file")
    files = [path for output in outputs if output for path in output.paths()]
    refuse_overlap([name for item in given if isinstance(item, Input) for name in item.names()], files)
    for output in outputs:
        output.check()


def refuse_overlap(reads: Iterable[str | Path], writes: Iterable[str | Path]) -> None:
    """Raise ValueError where one of the files that are written is read too, or is written twice, by whatever names."""
    reads, writes = [path for path in reads if os.path.exists(path)], list(writes)
    for number, path in enumerate(writes):
        for other in writes[:number]:
            if _one_file(path, other):
                raise ValueError(f"{_named(path, other)} is named for two outputs; give each a file of its own")
        for source in reads:
            if _one_file(path, source):
                raise ValueError(f"{_named(path, source)} is read by this command too; write to another file")
            if _is_part(Path(path), Path(source)):
                raise ValueError(f"{path} is a part of {source}, which this command reads; write to another file")


def _one_file(path: str | Path, other: str | Path) -> bool:
    there = [os.path.exists(path), os.path.exists(other)]
    if any(there):
        return all(there) and os.path.samefile(path, other)
    # Names that differ in case are one file on some disks.
    return os.path.realpath(path).casefold() == os.path.realpath(other).casefold()


def _is_part(path: Path, folder: Path) -> bool:
    """Whether `path` is a file that is read with `folder`."""
    inside = path.is_file() and folder.is_dir() and folder.resolve() in path.resolve().parents
    return inside and any(fnmatch(path.resolve().name, pattern) for pattern in _READ)


def _named(path: str | Path, other: str | Path) -> str:
    """A file by both its names."""
    return str(path) if str(path) == str(other) else f"{path} (which is {other})"
