"""Position-keyed sampling noise, which makes a sampled text a function of its seed.

The noise of a token is a hash of (seed of the row, absolute position, stream, token), where the stream says what the
number is for: the target's draw, a draft's, a rule's coin or the bonus. It does not depend on the row's
index in the batch, the node, the tree or the drafter, so plain and speculative decoding draw the same token at the same
position: `argmax(log p + gumbel)` is a draw from p (Gumbel-max), and two distributions that share the noise tend to
draw the same token (Gumbel coupling). Counter-based: there is no generator state, so a step can be captured. Knows
nothing of models or trees.
"""

import hashlib

import torch
from torch import Tensor

TARGET, DRAFT, ACCEPT, BONUS = range(4)  # independent streams
SILENT = -1, -1  # the key of a row that is greedy among others that are sampled: its Gumbel noise is 0

_WORD = 0xFFFFFFFF


def stream_key(seed: int, row: int = 0) -> tuple[int, int]:
    """The key of stream (seed, row): two 32-bit words."""
    digest = hashlib.blake2b(f"{seed},{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def stream_keys(seed: int | list[int], rows: int) -> list[tuple[int, int]]:
    """The key of each row. With an integer seed row r uses stream (seed, r); with a list, each row uses stream
    (its seed, 0), as in a batch of one with that seed."""
    return [stream_key(seed, row) for row in range(rows)] if isinstance(seed, int) else list(map(stream_key, seed))


def row_keys(seed: int | list[int], rows: int, device: torch.device | str) -> Tensor:
    """`stream_keys` as a tensor (B, 2)."""
    return torch.tensor(stream_keys(seed, rows), dtype=torch.int64, device=device)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int64: both factors keep the product below 2**63, so nothing overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


@torch.library.custom_op("paceline::position_words", mutates_args=())
def position_words(keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Two hash words for each row and position: keys (B, 2), positions (B, P) -> (B, P, 2).

    A custom operator, because a compiler that fuses element-wise code would recompute the whole chain of hashes at
    every use."""
    first = _mix(keys[:, :1] ^ _mix(positions * 4 + stream & _WORD))
    return torch.stack([first, _mix(keys[:, 1:] + first & _WORD)], dim=-1)


@position_words.register_fake
def _(keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    return positions.new_empty(len(keys), positions.shape[1], 2)


@torch.library.custom_op("paceline::counter_words", mutates_args=())
def counter_words(counters: Tensor) -> Tensor:
    """The counters spread over 32 bits.

    A custom operator, because a compiler may compute with an `arange` as with an index, whose 32 bits the product
    exceeds."""
    return counters * 0x9E3779B1 & _WORD


@counter_words.register_fake
def _(counters: Tensor) -> Tensor:
    return torch.empty_like(counters)


def uniform(keys: Tensor, positions: Tensor, stream: int, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32 and fine-grained near 0, for keys (B, 2), positions (B, P) and
    counters (K,) or (B, P, K), which must be below 2**31: (B, P, K)."""
    first, second = position_words(keys, positions, stream)[:, :, None].unbind(-1)  # (B, P, 1) each
    words = _mix(counter_words(counters) ^ first)
    words = _mix(words + second & _WORD)
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(keys: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for keys (B, 2), positions (B, P), tokens (K,) or (B, P, K): (B, P, K).

    Equals -log(e) for the exponential variate e = -log(1 - u). The largest noise comes from u near 0, where float32
    keeps the resolution of all 32 bits. A row whose key is `SILENT` has none.
    """
    drawn = -torch.log(-torch.log1p(-uniform(keys, positions, stream, tokens)))
    return torch.where(keys[:, :1, None] < 0, 0.0, drawn)
