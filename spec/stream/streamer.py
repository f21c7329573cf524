"""Streamed models: which they are, and how their layers get weights. Knows nothing of files and of decoding."""

from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from .record import StreamAbout, StreamRecord


class Streamer(Protocol):
    """Fetches the weights of a model's layers, each before it runs."""

    @property
    def about(self) -> StreamAbout: ...

    @property
    def record(self) -> StreamRecord:
        """What streaming has cost so far; cheap to take."""


_streamers: "WeakKeyDictionary[nn.Module, Streamer]" = WeakKeyDictionary()


def streamer_of(model: nn.Module | None) -> Streamer | None:
    """What streams `model`; None for a model whose weights are all in memory."""
    return None if model is None else _streamers.get(model)
