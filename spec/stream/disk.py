"""Layers from files, fetched by a thread while others compute. Knows nothing of models."""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from torch import Tensor

from ..console import one_line
from .layout import FileRecord
from .reader import Reader
from .record import StreamError
from .ring import Ring

ENDING = 30.0  # seconds that an exit waits for a layer on its way

_running: "weakref.WeakSet[Prefetcher]" = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End all threads before the interpreter does: one that comes back from torch later aborts the process."""
    running = list(_running)
    for prefetcher in running:
        prefetcher.close()
    for prefetcher in running:
        prefetcher.join(ENDING)


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
        self._changed = threading.Condition(threading.RLock())  # `close` may come in the midst of anything
        self._process = os.getpid()
        self.waited = self.fetching = 0.0  # seconds
        self.bytes = 0
        self._errors: dict[int, StreamError] = {}  # of layers that could not be fetched, until they are asked for
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paceline-stream", daemon=True)
        self._thread.start()
        _running.add(self)

    def acquire(self, layer: int, user: Hashable) -> int:
        """The buffer that holds `layer`, once it does, for `user` until `release`. Raises StreamError."""
        if os.getpid() != self._process:
            raise StreamError("a streamed model cannot be used in a forked process; load it there")
        begun = time.perf_counter()
        with self._changed:
            self.ring.ask(layer, user)
            for other in self._errors.keys() - {layer}:  # of a forward that was broken off, or to be tried again
                del self._errors[other]
            self._changed.notify_all()
            try:
                while (buffer := self.ring.take(layer, user)) is None:
                    if (error := self._errors.pop(layer, None)) is not None:
                        raise error
                    self._changed.wait()
            except BaseException:
                self.ring.leave(user)
                self._changed.notify_all()  # while there was an error, nothing was fetched for others either
                raise
            finally:
                self.waited += time.perf_counter() - begun
            return buffer

    def release(self, user: Hashable, unused: Callable[[int], None]) -> None:
        """`user` no longer computes with its buffer. `unused` is called with the layer if nobody else does."""
        if os.getpid() != self._process:
            return
        with self._changed:
            if (left := self.ring.leave(user)) is not None and left[1] is not None:
                unused(left[1])
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch no more. The thread ends, and closes the files, when its last layer is there. It is not waited for, as
        whatever collects garbage may call this, also the threads that read."""
        if os.getpid() == self._process:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, after `close`."""
        if os.getpid() == self._process:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._fetch_all()
        finally:
            self._files.close()

    def _fetch_all(self) -> None:
        while (job := self._next()) is not None:
            layer, buffer = job
            begun, size, error = time.perf_counter(), 0, None  # type: float, int, StreamError | None
            try:
                size = self._files.fetch(layer, buffer)
            except StreamError as problem:
                error = problem
            except Exception as problem:  # which must not leave a forward waiting
                error = StreamError(f"the weights of a layer could not be fetched ({one_line(problem)}); try it again")
            with self._changed:
                self.ring.fetched(buffer, error is None)
                self.fetching += time.perf_counter() - begun
                self.bytes += size
                # Nobody would take an error for a layer that was fetched ahead while others are waited for.
                if error is not None and (not self.ring.waiting or layer in self.ring.waiting.values()):
                    self._errors[layer] = error
                self._changed.notify_all()

    def _next(self) -> tuple[int, int] | None:
        """The next layer to fetch, and into which buffer, once there is one; None at the end."""
        with self._changed:
            while not self._closed:
                if not self._errors and (job := self.ring.fetch()) is not None:
                    return job
                self._changed.wait()
        return None
