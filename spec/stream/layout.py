"""The folder of a repacked model: what is in it, and how its files are written so that nothing half done is taken for
whole.

    layer-000.bin ...   the streamed weights of one decoder layer each, in the form in which products read them
    resident.bin        what stays in memory: LM head, norms, biases and other small things
    embeddings.bin      the rows of the embeddings, of which a forward reads those that it needs
    NAME.json           beside each file: what it holds, written when the file is whole
    stream.json         the model in all, written last
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
from ..files import whole, write_json
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


class FileWriter:
    """Writes tensors to a file, piece after piece."""

    def __init__(self, path: Path):
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
            self._file.write(self._piece)
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
                writer = FileWriter(beside)
                try:
                    fill(writer)
                    record = writer.finish()
                finally:
                    writer.close()
            write_json(self.path / f"{name}.json", asdict(record))
        except OSError as error:
            raise StreamError(self._not_written(name, error)) from error
        return record

    def _not_written(self, name: str, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.path).free
            return (
                f"the disk is full at {name} of {self.path} ({free / 1e9:.1f} GB are free); make room, or set "
                "PACELINE_CACHE to a folder on another disk: what is written stays, and repacking goes on from there"
            )
        return f"{self.file(name)} cannot be written ({error.strerror or error}); set PACELINE_CACHE to another folder"

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
        try:
            write_json(self.path / "stream.json", {"format": FORMAT, "files": files, **about})
        except OSError as error:
            raise StreamError(self._not_written("stream", error)) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The block has the folder to itself; another process in it is waited for, with a line. Raises StreamError
        where the folder cannot be made."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "ab")  # noqa: SIM115 (below)
        except OSError as error:
            raise StreamError(self._not_written("lock", error)) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with waiting(f"another process is repacking into {self.path}"):
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            yield

    def tested(self, key: str) -> bool:
        """Whether the self-test was passed under `key`."""
        return key in self._tests()

    def keep_test(self, key: str) -> None:
        """Keep that the self-test was passed, where the folder can be written."""
        with suppress(OSError):
            write_json(self.path / "selftest.json", {**self._tests(), key: True})

    def _tests(self) -> dict[str, Any]:
        try:
            stored = json.loads((self.path / "selftest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}
