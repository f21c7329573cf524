"""Streamed models: hooks that give each layer its weights before it runs. Knows nothing of files and of decoding.

Between its runs a layer has `nothing`, whose numbers are NaN, so that whoever reads weights that are not there notices.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn

from .forms import Parts, put
from .layout import StreamFolder
from .record import StreamAbout, StreamRecord, Uncopied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tables = list[list[dict[nn.Module, Parts]]]  # [buffer][streamed layer]: with what its modules compute


class Feeder(Protocol):
    """Brings layers, numbered from 0, into buffers."""

    @property
    def waited(self) -> float:
        """Seconds in which forwards stood still."""

    @property
    def fetching(self) -> float:
        """Seconds in which something was fetched."""

    bytes: int  # that were fetched

    def acquire(self, layer: int, user: Hashable) -> int:
        """The buffer that holds `layer`, for `user` until `release`."""

    def release(self, user: Hashable, unused: Callable[[int], None]) -> None:
        """`user` no longer computes with its buffer, if it has one. `unused` is called with its layer if nobody else
        computes with that, before anybody can."""

    def close(self) -> None:
        """Fetch no more; waits for nothing."""


class Streamer(Uncopied):
    """Fetches the weights of some decoder layers of a model, each before it runs.

    `layers` are the streamed ones, `first` the model's first; `tables` say with what a layer computes from each buffer,
    `blank` with what between its runs."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        first: nn.Module,
        tables: Tables,
        blank: list[dict[nn.Module, Parts]],
        feeder: Feeder | None,
        about: StreamAbout,
        folder: StreamFolder,
    ):
        self.about, self.folder = about, folder
        self._tables, self._blank, self._feeder, self._forwards = tables, blank, feeder, 0
        first.register_forward_pre_hook(self._count)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, number), prepend=True)
            layer.register_forward_hook(self._after, always_call=True)
        if feeder is not None:
            weakref.finalize(self, feeder.close)

    @property
    def record(self) -> StreamRecord:
        """What streaming has cost so far; cheap to take."""
        feeder = self._feeder
        if feeder is None:
            return StreamRecord(self._forwards)
        return StreamRecord(self._forwards, feeder.waited, feeder.fetching, feeder.bytes)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self._forwards += 1

    def _before(self, number: int, module: nn.Module, args: tuple) -> None:
        assert self._feeder is not None
        self._leave()  # a layer in which this thread was interrupted
        buffer = self._feeder.acquire(number, threading.current_thread())
        for part, parts in self._tables[buffer][number].items():
            put(part, parts)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        assert self._feeder is not None
        self._feeder.release(threading.current_thread(), self._put_blank)

    def _put_blank(self, number: int) -> None:
        for part, parts in self._blank[number].items():
            put(part, parts)


_streamers: "WeakKeyDictionary[nn.Module, Streamer]" = WeakKeyDictionary()


def set_streamer(model: nn.Module, streamer: Streamer) -> None:
    _streamers[model] = streamer


CHUNK = 512  # tokens of a prompt that are read at a time
_MOST, _SHARE = 2048, 1 / 16  # of a streamed model: at most, and how much of its resident bytes their activations take


def prompt_chunk(model: "PreTrainedModel") -> int:
    """How many tokens of a prompt to read at a time. A streamed model reads more, because every chunk takes a pass over
    all weights, as long as the memory for it is little beside that of the weights."""
    if (streamer := streamer_of(model)) is None:
        return CHUNK
    return min(max(CHUNK, int(_SHARE * streamer.about.resident_bytes / activation_bytes(model))), _MOST)


def activation_bytes(model: "PreTrainedModel") -> int:
    """About the bytes that a token's activations take in a layer."""
    config = model.config.get_text_config()
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return model.dtype.itemsize * (8 * hidden + 3 * inner)


def streamer_of(model: nn.Module | None) -> Streamer | None:
    """What streams `model`; None for a model whose weights are all in memory."""
    return None if model is None else _streamers.get(model)
