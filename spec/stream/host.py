"""Layers from the host's memory to a GPU: copied on a stream of their own while others compute.

The host only puts work into queues and never waits: a copy into a buffer is queued behind what still computes with it,
and what computes with a buffer behind the copy into it, by events. Not run on a GPU yet: what is queued, and in what
order, is tested with a device that is only pretended. Knows nothing of models.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .record import StreamError
from .ring import Ring


class Copies(Protocol):
    """Copies of layers into buffers of a device, one after the other, beside what computes."""

    @property
    def waited(self) -> float:
        """Seconds that were spent waiting for copies, as far as is known."""

    @property
    def fetching(self) -> float:
        """Seconds that copies took, as far as is known."""

    def copy(self, layer: int, buffer: int) -> int:
        """Queue a copy, behind all uses of the buffer that have ended by `leave`; returns its bytes."""

    def wait(self, buffer: int) -> None:
        """What this thread queues from now on computes when the last copy into the buffer is done."""

    def leave(self, buffer: int) -> None:
        """What this thread has queued until now is the last that computes with the buffer."""

    def close(self) -> None: ...


class HostFeeder:
    """Layers in turn through buffers, by queued copies."""

    def __init__(self, layers: int, buffers: int, copies: Copies):
        self.ring, self.copies, self.bytes = Ring(layers, buffers), copies, 0
        self._changed = threading.Condition(threading.RLock())
        with self._changed:
            self._queue()

    @property
    def waited(self) -> float:
        return self.copies.waited

    @property
    def fetching(self) -> float:
        return self.copies.fetching

    def acquire(self, layer: int, user: Hashable) -> int:
        """The buffer that holds `layer` once what is queued is done, for `user` until `release`."""
        with self._changed:
            self.ring.ask(layer, user)
            self._queue()
            try:
                while (buffer := self.ring.take(layer, user)) is None:  # other threads compute with all of them
                    self._changed.wait()
            except BaseException:
                self.ring.leave(user)
                raise
            self.copies.wait(buffer)
            return buffer

    def release(self, user: Hashable, unused: Callable[[int], None]) -> None:
        """`user` has queued all that it computes with its buffer. `unused` is called with the layer if nobody else
        computes with it."""
        with self._changed:
            if (left := self.ring.leave(user)) is not None:
                buffer, layer = left
                self.copies.leave(buffer)
                if layer is not None:
                    unused(layer)
            self._queue()
            self._changed.notify_all()

    def close(self) -> None:
        self.copies.close()

    def _queue(self) -> None:
        while (job := self.ring.fetch()) is not None:
            self.bytes += self.copies.copy(*job)
            self.ring.fetched(job[1], True)


class CudaCopies:
    """Copies from pinned memory of the host, `layers` (bytes,) uint8, to `buffers` on a CUDA device."""

    def __init__(self, layers: Sequence[Tensor], buffers: Sequence[Tensor]):
        self.layers, self.buffers, self.device = layers, buffers, buffers[0].device
        self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still use the buffers' memory
        self._filled = [torch.cuda.Event() for _ in buffers]
        self._left: list[list[torch.cuda.Event]] = [[] for _ in buffers]  # ends of uses since the last copy
        self._spans: dict[str, deque] = {"waited": deque(), "fetching": deque()}  # pairs of events not counted yet
        self._seconds = dict.fromkeys(self._spans, 0.0)
        self._pinned: list[Tensor] = []
        try:
            for layer in layers:
                pin(layer)
                self._pinned.append(layer)
        except BaseException:
            self.close()
            raise

    def copy(self, layer: int, buffer: int) -> int:
        source = self.layers[layer]
        with torch.cuda.stream(self.stream):
            for event in self._left[buffer]:
                self.stream.wait_event(event)
            self._left[buffer].clear()
            begun = self._now(self.stream)
            self.buffers[buffer][: len(source)].copy_(source, non_blocking=True)
            self._filled[buffer].record(self.stream)
            self._spans["fetching"].append((begun, self._now(self.stream)))
        return len(source)

    def wait(self, buffer: int) -> None:
        stream = torch.cuda.current_stream(self.device)
        begun = self._now(stream)
        stream.wait_event(self._filled[buffer])
        self._spans["waited"].append((begun, self._now(stream)))

    def leave(self, buffer: int) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._left[buffer].append(event)

    @property
    def waited(self) -> float:
        return self._counted("waited")

    @property
    def fetching(self) -> float:
        return self._counted("fetching")

    def _now(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _counted(self, name: str) -> float:
        """The seconds of all spans that have ended."""
        spans = self._spans[name]
        while spans and spans[0][1].query():
            begun, ended = spans.popleft()
            self._seconds[name] += begun.elapsed_time(ended) / 1000
        return self._seconds[name]

    def close(self) -> None:
        self.stream.synchronize()  # before the memory is somebody else's
        for layer in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(layer.data_ptr())


def pin(memory: Tensor) -> None:
    """Keep memory of the host in its place, so that a GPU copies from it by itself. Torch's own pinned memory comes in
    powers of two, up to twice as much. Raises StreamError where the system refuses."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) != 0:
        raise StreamError(
            f"the system does not let {memory.nbytes / 1e6:.0f} MB of the host's memory be pinned (CUDA error "
            f"{int(error)}); raise its limit of locked memory (ulimit -l), or allow more resident layers"
        )
