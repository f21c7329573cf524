"""A request: a text to continue in a row of the batch, and all that is data of that row.

Another seed, temperature or end of text is another number in a buffer, and needs no other step.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What a row's scores are warped by, as far as the sampler applies it."""

    temperature: float = 1.0
    top_k: int = 1
    tail: float = 0.0  # 1 - top_p, the probability that is cut off
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `tokens` by at most `new_tokens`, or up to one of the token ids `ends`, drawing from stream `key`."""

    tokens: list[int]
    new_tokens: int
    key: tuple[int, int]  # see noise.row_keys
    ends: tuple[int, ...] = ()
    sampling: RowSampling = RowSampling()
