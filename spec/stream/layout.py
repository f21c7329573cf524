"""The folder of a repacked model: what is in it, and how its files are written so that nothing half done is taken for
whole.

    layer-000.bin ...   the streamed weights of one decoder layer each, in the form in which products read them
    resident.bin        what stays in memory: LM head, norms, biases and other small things
    embeddings.bin      the rows of the embeddings, of which a forward reads those that it needs
    NAME.json           beside each file: what it holds, written when the file is whole
    stream.json         the model in all, written last
    source.json         of what files it is made
    selftest.json       by versions: that the self-test was passed

A file is a run of tensors, each at a multiple of 64 bytes, filled up to whole pages. Knows nothing of models.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import waiting
from ..files import lock, whole, write_json
from .reader import PIECE, checksum, padded
from .record import StreamError

FORMAT = 1
_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def size(self) -> int:
        return prod(self.shape) * torch_dtype(self.dtype).itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, on the memory (bytes of the file,) uint8 that the file was read into."""
        return memory[self.start : self.start + self.size].view(torch_dtype(self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file holds."""

    size: int
    sums: list[int]  # checksums of its pieces
    tensors: dict[str, Stored]
    forms: dict[str, dict] = field(default_factory=dict)  # of linear layers, by their paths (forms.py)

    def of(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors, on the memory (bytes of the file,) uint8 that the file was read into."""
        return {name: stored.of(memory) for name, stored in self.tensors.items()}

    @classmethod
    def parsed(cls, value: dict) -> "FileRecord":
        stored = {
            name: Stored(each["dtype"], tuple(each["shape"]), each["start"]) for name, each in value["tensors"].items()
        }
        return cls(value["size"], value["sums"], stored, value["forms"])


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_full(error: Exception) -> bool:
    """Whether an error, of whatever kind, says that a disk is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def not_written(file: Path, error: Exception) -> StreamError:
    """What to say where a file of a folder cannot be written."""
    if is_full(error):
        free = shutil.disk_usage(file.parent).free
        return StreamError(
            f"the disk is full at {file.stem} of {file.parent} ({free / 1e9:.1f} GB are free); make room, or set "
            "PACELINE_CACHE to a folder on another disk: what is written stays, and repacking goes on from there"
        )
    why = getattr(error, "strerror", None) or error
    return StreamError(f"{file} cannot be written ({why}); set PACELINE_CACHE to another folder")


class FileWriter:
    """Writes tensors to a file `path`, which will be `named`, piece after piece. Raises StreamError where it cannot be
    written; errors of who gives the tensors stay what they are."""

    def __init__(self, path: Path, named: Path):
        self._named = named
        self.tensors: dict[str, Stored] = {}
        self.forms: dict[str, dict] = {}
        self._file = open(path, "wb")  # noqa: SIM115 (`close` does)
        self._sums: list[int] = []
        self._piece = bytearray()  # what of the present piece is not written yet
        self._size = 0

    def put(self, name: str, tensor: Tensor) -> None:
        self.put_rows(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def put_rows(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """A tensor that comes in pieces, which lie one after the other."""
        self._fill(-self._size % _ALIGNED)
        self.tensors[name] = stored = Stored(dtype_name(dtype), shape, self._size)
        for piece in pieces:
            self._add(memoryview(piece.detach().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        assert self._size == stored.start + stored.size, "the pieces are the tensor"

    def _fill(self, count: int) -> None:
        self._add(memoryview(bytes(count)))

    def _add(self, data: memoryview) -> None:
        self._size += len(data)
        while data:
            taken = min(len(data), PIECE - len(self._piece))
            self._piece += data[:taken]
            data = data[taken:]
            if len(self._piece) == PIECE:
                self._flush()

    def _flush(self) -> None:
        if self._piece:
            self._sums.append(checksum(self._piece))
            try:
                self._file.write(self._piece)
            except OSError as error:
                raise not_written(self._named, error) from error
            self._piece.clear()

    def finish(self) -> FileRecord:
        self._fill(padded(self._size) - self._size)
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # it shall not fill the page cache
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return FileRecord(self._size, self._sums, self.tensors, self.forms)

    def close(self) -> None:
        self._file.close()


class StreamFolder:
    """The folder of a repacked model, whole or not."""

    def __init__(self, path: Path):
        self.path = path

    def file(self, name: str) -> Path:
        return self.path / f"{name}.bin"

    def record(self, name: str) -> FileRecord | None:
        """What a file holds; None where it is not whole, or not as long as it was."""
        try:
            record = FileRecord.parsed(json.loads((self.path / f"{name}.json").read_text(encoding="utf-8")))
            return record if self.file(name).stat().st_size == record.size else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, name: str, fill: Callable[[FileWriter], None]) -> FileRecord:
        """Write a file, whole or not at all. Raises StreamError where the disk is full or fails."""
        try:
            (self.path / f"{name}.json").unlink(missing_ok=True)
            with whole(self.file(name)) as beside:
                writer = FileWriter(beside, self.file(name))
                try:
                    fill(writer)
                    record = writer.finish()
                finally:
                    writer.close()
            write_json(self.path / f"{name}.json", asdict(record))
        except OSError as error:
            raise not_written(self.file(name), error) from error
        return record

    def model(self) -> dict[str, Any] | None:
        """What stream.json says of the model; None where the folder is not whole."""
        try:
            said = json.loads((self.path / "stream.json").read_text(encoding="utf-8"))
            if said["format"] != FORMAT or any(self.record(name) is None for name in said["files"]):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return said

    def finish(self, about: dict[str, Any], files: list[str]) -> None:
        self._write_json("stream", {"format": FORMAT, "files": files, **about})

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        try:
            write_json(self.path / f"{name}.json", value)
        except OSError as error:
            raise not_written(self.path / f"{name}.json", error) from error

    def begin(self, source: str, files: list) -> list["StreamFolder"]:
        """Keep what is repacked here: the `files` of a source. Returns the folders beside this one for other files of
        the same source, which are there no more."""
        self._write_json("source", {"source": source, "files": files})
        return [
            StreamFolder(said.parent)
            for said in sorted(self.path.parent.glob("*/source.json"))
            if (other := _read_json(said)).get("source") == source and other.get("files") != files
        ]

    @property
    def bytes(self) -> int:
        """Of all that is there."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The block has the folder to itself; another process in it is waited for, with a line. Raises StreamError
        where the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "ab")  # noqa: SIM115 (below)
        except OSError as error:
            raise not_written(self.path / "lock", error) from error
        with file:
            if not lock(file):
                with waiting(f"another process is repacking into {self.path}"):
                    lock(file, wait=True)
            yield

    def tested(self, key: str) -> bool:
        """Whether the self-test was passed under `key`."""
        return key in _read_json(self.path / "selftest.json")

    def keep_test(self, key: str) -> None:
        """Keep that the self-test was passed, where the folder can be written."""
        with suppress(OSError):
            write_json(self.path / "selftest.json", {**_read_json(self.path / "selftest.json"), key: True})


def _read_json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where it cannot be read."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
