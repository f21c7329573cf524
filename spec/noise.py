"""Position-keyed sampling noise: what makes a sampled text a function of its seed.

The noise for a token is a hash of (the row's own seed, absolute position, stream, token). The row's
place in the batch, the node, the tree and the drafter do not enter, so plain and speculative decoding
draw the same token at the same position: `argmax(log p + gumbel)` is a draw from p (Gumbel-max), and
two laws that share the noise tend to draw the same token (Gumbel coupling). Counter-based, so nothing
is drawn in order and a captured step needs no generator. Knows nothing of models or trees.
"""

import hashlib

import torch
from torch import Tensor

TARGET, DRAFT, ACCEPT, BONUS = range(4)  # independent streams

_WORD = 0xFFFFFFFF


def row_keys(seed: int | list[int], rows: int, device: torch.device | str) -> Tensor:
    """Two 32-bit words for each row, (B, 2): row r of an integer seed uses stream (seed, r); a list
    gives every row its own seed, row r then being what a batch of one with that seed is."""
    pairs = [(seed, row) for row in range(rows)] if isinstance(seed, int) else [(own, 0) for own in seed]
    digests = [hashlib.blake2b(f"{own},{row}".encode(), digest_size=8).digest() for own, row in pairs]
    words = [[int.from_bytes(d[:4], "little"), int.from_bytes(d[4:], "little")] for d in digests]
    return torch.tensor(words, dtype=torch.int64, device=device)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int64: both factors keep the product below 2**63, so nothing overflows."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


@torch.library.custom_op("paceline::position_words", mutates_args=())
def position_words(keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Two hash words for each row and position: keys (B, 2), positions (B, P) -> (B, P, 2).

    An operator of its own because a compiler that fuses element-wise code would unfold the whole chain of
    hashes at every use, twice for each level of it."""
    first = _mix(keys[:, :1] ^ _mix(positions * 4 + stream & _WORD))
    return torch.stack([first, _mix(keys[:, 1:] + first & _WORD)], dim=-1)


@position_words.register_fake
def _(keys: Tensor, positions: Tensor, stream: int) -> Tensor:
    return positions.new_empty(len(keys), positions.shape[1], 2)


def uniform(keys: Tensor, positions: Tensor, stream: int, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32 and fine-grained near 0, for keys (B, 2), positions (B, P) and
    counters (K,) or (B, P, K), which must be below 2**31: (B, P, K)."""
    first, second = position_words(keys, positions, stream)[:, :, None].unbind(-1)  # (B, P, 1) each
    words = _mix((counters * 0x9E3779B1 & _WORD) ^ first)
    words = _mix(words + second & _WORD)
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(keys: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for keys (B, 2), positions (B, P), tokens (K,) or (B, P, K): (B, P, K).

    The winner of a race is the token with the smallest exponential -log(1-u): taking u near 0 for the
    winners keeps 32 bits of resolution where it decides.
    """
    return -torch.log(-torch.log1p(-uniform(keys, positions, stream, tokens)))
