"""A request: a text to continue in one row of the batch, with the row's settings.

These settings (seed, temperature, ends of text ...) are values in buffers: changing them needs no new compiled step.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RowSampling:
    """The sampling settings of a row; which of them are applied is fixed by the sampler."""

    temperature: float = 1.0
    top_k: int = 1  # above the vocabulary: no limit
    tail: float = 0.0  # 1 - top_p, the probability that is cut off
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What target and drafter keep of the first `count` tokens of a text (reuse.py), which need not be read again."""

    count: int
    target: Any  # as its save_row gave it
    session: Any  # None where the drafter's sessions remember nothing


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `tokens` by at most `new_tokens`, or up to one of the token ids `ends`, drawing from stream `key`."""

    tokens: list[int]
    new_tokens: int
    key: tuple[int, int]  # see noise.stream_key
    ends: tuple[int, ...] = ()
    sampling: RowSampling = RowSampling()
    held: Held | None = None
    predicted: tuple[int, ...] = ()  # what the text may copy, besides itself
    beside: int = 0  # how much longer the longest prompt of its batch is: some rotary embeddings look at that (rope.py)
