"""Reading files into memory past the page cache: direct reads, several at a time, of pieces of some megabytes.

Direct reads (O_DIRECT) need offsets, sizes and memory that are multiples of 4096 bytes; `pages` gives such memory, and
files are written in such sizes. Where a file system refuses direct reads, usual ones take their place, with a sentence.
What was read is compared with the checksums of the pieces once in a run. Knows nothing of what files hold.
"""

import contextlib
import errno
import mmap
import os
import sys
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .record import StreamError

PAGE = 4096
PIECE = 8 << 20  # bytes that are read at a time
THREADS = 4


def pages(size: int) -> Tensor:  # (size,) uint8
    """Memory for `size` bytes that begins at a page and that nothing has touched yet, on large pages where the system
    has them."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(padded(size), PAGE), **private)  # shared memory, the default, has no large pages
    with contextlib.suppress(AttributeError, OSError):  # of systems that know none
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]  # which keeps the memory


def padded(size: int) -> int:
    """`size`, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def checksum(piece: memoryview | bytearray) -> int:
    return zlib.crc32(piece)


class Reader:
    """Reads whole files into memory. `direct` says whether it goes past the page cache."""

    def __init__(self) -> None:
        self.direct = hasattr(os, "O_DIRECT")
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="paceline-read")
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, sums: Sequence[int], into: Tensor) -> None:
        """Fill `into` (bytes of the file,) uint8, memory of `pages`, with a file whose pieces have the checksums
        `sums`. Raises StreamError where that cannot be done, or the file is not what was written."""
        file = self._files.get(path) or self._opened(path, len(into))
        view = memoryview(into.numpy())  # type: ignore[arg-type]
        jobs: list[Future] = []
        try:
            for start, total in zip(range(0, len(into), PIECE), sums, strict=True):
                jobs.append(self._pool.submit(self._read_piece, file, view[start : start + PIECE], start, total))
        finally:  # all have ended, whatever happened
            errors = [error for job in jobs if (error := job.exception()) is not None]
        file.check()
        if errors:
            raise errors[0]
        file.compared = True

    def verify(self, path: Path, size: int, sums: Sequence[int]) -> None:
        """Raise StreamError where a file is not what was written, or cannot be read. Takes the memory of a piece."""
        file = self._files.get(path) or self._opened(path, size)
        view = memoryview(pages(min(size, PIECE)).numpy())  # type: ignore[arg-type]
        for start, total in zip(range(0, size, PIECE), sums, strict=True):
            self._read_piece(file, view[: size - start], start, total)
        file.check()

    def _opened(self, path: Path, size: int) -> "OpenFile":
        file = self._files[path] = OpenFile(path, size, self.direct)
        if self.direct and not file.direct:
            self._say_not_direct(path)
        return file

    def _say_not_direct(self, path: Path) -> None:
        with self._lock:
            told, self.direct = not self.direct, False
        if not told:
            print(
                f"{path.parent} is on a file system without direct reads: what is read stays in the page cache as well",
                file=sys.stderr,
            )

    def _read_piece(self, file: "OpenFile", view: memoryview, start: int, total: int) -> None:
        done = 0
        while done < len(view):
            direct = file.direct  # of this read: another thread may be the first to see that it cannot be
            try:
                count = os.preadv(file.descriptor, [view[done:]], start + done)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    file.read_as_usual()
                    self._say_not_direct(file.path)
                    continue
                raise StreamError(
                    f"{file.path} cannot be read ({error.strerror or error}); check the disk, or "
                    f"{REMEDY.format(file.path.parent)}"
                ) from error
            if count < len(view) - done:
                file.check()  # it may have been cut short here
            count -= count % PAGE if direct else 0  # the next direct read begins at a page as well
            if not count:
                raise file.changed()
            done += count
        if not file.compared and checksum(view) != total:
            raise StreamError(f"{file.path} does not hold what was written to it; {REMEDY.format(file.path.parent)}")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()
        self._files.clear()


REMEDY = "delete {} and load the model again: it is made anew"


class OpenFile:
    """A file of a known size that is not to change while it is open. Raises StreamError where it cannot be opened."""

    def __init__(self, path: Path, size: int, direct: bool):
        self.path, self.size, self.direct, self.compared = path, size, direct, False
        self._lock, self._left = threading.Lock(), []  # type: threading.Lock, list[int]
        self.descriptor = self._opened(direct)
        self.time = os.fstat(self.descriptor).st_mtime_ns
        try:
            self.check()
        except StreamError:
            self.close()
            raise

    def _opened(self, direct: bool) -> int:
        try:
            if direct:
                try:
                    return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.direct = False
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise StreamError(
                f"{self.path} cannot be opened ({error.strerror or error}); {REMEDY.format(self.path.parent)}"
            ) from error

    def read_as_usual(self) -> None:
        """From now on read through the page cache. What others may still be reading from is closed at the end."""
        with self._lock:
            if self.direct:
                self._left.append(self.descriptor)
                self.descriptor = self._opened(direct=False)
                self.direct = False  # and not before there is the other descriptor

    def check(self) -> None:
        """Raise StreamError where the file has changed since it was opened, or is not as long as was written."""
        about = os.fstat(self.descriptor)
        if about.st_size != self.size or about.st_mtime_ns != self.time:
            raise self.changed()

    def changed(self) -> StreamError:
        size = os.fstat(self.descriptor).st_size
        how = f"has {size} bytes of {self.size}" if size != self.size else "was changed while it was in use"
        return StreamError(f"{self.path} {how}; {REMEDY.format(self.path.parent)}")

    def close(self) -> None:
        for descriptor in (self.descriptor, *self._left):
            os.close(descriptor)
