"""Layers from files, fetched by a thread while others compute. Knows nothing of models."""

import threading
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

from torch import Tensor

from ..console import one_line
from .layout import FileRecord
from .reader import Reader
from .record import StreamError
from .ring import Ring


class LayerFiles:
    """The files of layers, and the buffers that they are read into."""

    def __init__(self, reader: Reader, files: Sequence[tuple[Path, FileRecord]], buffers: Sequence[Tensor]):
        self.reader, self.files, self.buffers = reader, files, buffers

    def fetch(self, layer: int, buffer: int) -> int:
        """Read a layer into a buffer; returns its bytes. Raises StreamError."""
        path, record = self.files[layer]
        self.reader.read(path, record.sums, self.buffers[buffer][: record.size])
        return record.size

    def close(self) -> None:
        self.reader.close()


class Prefetcher:
    """Fetches layers from files into buffers, in a thread of its own."""

    def __init__(self, files: LayerFiles):
        self.ring, self._files = Ring(len(files.files), len(files.buffers)), files
        self.changed = threading.Condition(threading.RLock())
        self.waited = self.fetching = 0.0  # seconds
        self.bytes = 0
        self._errors: dict[int, StreamError] = {}  # of layers that could not be fetched, until they are asked for
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paceline-stream", daemon=True)
        self._thread.start()

    def acquire(self, layer: int, user: Hashable) -> int:
        """The buffer that holds `layer`, once it does, for `user` until `release`. Raises StreamError."""
        begun = time.perf_counter()
        with self.changed:
            self.ring.ask(layer, user)
            for other in self._errors.keys() - {layer}:  # of a forward that was broken off, or to be tried again
                del self._errors[other]
            self.changed.notify_all()
            try:
                while (buffer := self.ring.take(layer, user)) is None:
                    if (error := self._errors.pop(layer, None)) is not None:
                        raise error
                    self.changed.wait()
            except BaseException:
                self.ring.leave(user)
                raise
            finally:
                self.waited += time.perf_counter() - begun
            return buffer

    def release(self, user: Hashable) -> None:
        """`user` no longer computes with its buffer, if it has one."""
        with self.changed:
            self.ring.leave(user)
            self.changed.notify_all()

    def held(self, user: Hashable) -> tuple[int, int] | None:
        """The layer that `user` computes with, and how many others do; None where it computes with none."""
        return self.ring.held(user)

    def close(self) -> None:
        """Fetch no more. The thread ends when its last layer is there."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join()
        self._files.close()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            layer, buffer = job
            begun, size, error = time.perf_counter(), 0, None  # type: float, int, StreamError | None
            try:
                size = self._files.fetch(layer, buffer)
            except StreamError as problem:
                error = problem
            except Exception as problem:  # which must not leave a forward waiting
                error = StreamError(f"the weights of a layer could not be fetched ({one_line(problem)}); try it again")
            with self.changed:
                self.ring.fetched(buffer, error is None)
                self.fetching += time.perf_counter() - begun
                self.bytes += size
                if error is not None:
                    self._errors[layer] = error
                self.changed.notify_all()

    def _next(self) -> tuple[int, int] | None:
        """The next layer to fetch, and into which buffer, once there is one; None at the end."""
        with self.changed:
            while not self._closed:
                if not self._errors and (job := self.ring.fetch()) is not None:
                    return job
                self.changed.wait()
        return None
