"""Beginnings of prompts that were read before, kept by whole chunks.

Only whole chunks are kept and taken over, so that a prompt is read in the same chunks with what was kept as without,
to the same bits. What one tenant has sent another never gets, as the time to the first token would tell. The least
recently used are dropped. Knows nothing of how rows are laid out.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..engines.reuse import nbytes_of
from ..proposal import Drafter
from ..request import Held
from ..step import Engine
from ..target.protocol import can_resume as can_save_rows
from ..target.rope import read_alike
from .job import Job
from .lanes import Lane
from .scheduler import Prefixes

MEGABYTES = 512.0


@dataclass(slots=True, eq=False)
class Kept:
    """What is known of the first tokens of a prompt, under the keys of its chunks."""

    tokens: list[int]
    held: Held
    keys: list[bytes]

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.held.target) + nbytes_of(self.held.session)


def can_resume(engine: Engine, remembers: bool) -> bool:
    """Whether an engine can go on from what was kept; with a drafter that `remembers`, its session has to."""
    return can_save_rows(engine.target) and (not remembers or can_save_rows(engine.session))


class KeptPrefixes(Prefixes):
    """At most `megabytes` of beginnings, in chunks of `chunk` tokens. `tell` is called with how many tokens of a prompt
    were looked up, and how many of them were kept."""

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        chunk: int,
        megabytes: float = MEGABYTES,
        tell: Callable[[int, int], None] = lambda asked, kept: None,
    ):
        self.model, self.remembers, self.chunk = model, drafter.traits.remembers, chunk
        self.bytes, self.tell = megabytes * 1e6, tell
        self._by_key: dict[bytes, Kept] = {}
        self._kept: OrderedDict[int, Kept] = OrderedDict()  # by identity, the least recently used first

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def find(self, job: Job) -> Held | None:
        """The longest beginning that leaves two tokens to be read; none of a prompt whose tokens are scored."""
        tokens = job.request.tokens
        if job.asked.prompt_logprobs is not None:
            return None
        keys = self._keys(job)
        for count in range(min(len(keys), (len(tokens) - 2) // self.chunk), 0, -1):
            kept, size = self._by_key.get(keys[count - 1]), count * self.chunk
            if kept is not None and kept.tokens[:size] == tokens[:size]:
                self._kept.move_to_end(id(kept))
                self.tell(len(tokens), size)
                return Held(size, kept.held.target, kept.held.session)
        self.tell(len(tokens), 0)
        return None

    def keep(self, lane: Lane, row: int, job: Job) -> None:
        keys = self._keys(job)
        if not keys or keys[-1] in self._by_key:
            return
        size = len(keys) * self.chunk
        with torch.no_grad():
            held = lane.engine.hold(row, self.remembers, size)
        made = Kept(job.request.tokens[:size], held, keys)
        for key in keys:
            former = self._by_key.get(key)
            self._by_key[key] = made
            if former is not None:
                former.keys.remove(key)
                if not former.keys:
                    del self._kept[id(former)]
        self._kept[id(made)] = made
        while self._kept and self.nbytes > self.bytes:
            _, dropped = self._kept.popitem(last=False)
            for key in dropped.keys:
                del self._by_key[key]

    def _keys(self, job: Job) -> list[bytes]:
        """A key for each whole chunk that is read of a prompt: of its tokens and all before them."""
        tokens, keys = job.request.tokens, []
        rotated = read_alike(self.model, len(tokens), 0, len(tokens))
        if rotated is None:
            return []
        key = f"{job.asked.tenant} {rotated}".encode()
        for count in range(1, (len(tokens) - 1) // self.chunk + 1):
            part = tokens[(count - 1) * self.chunk : count * self.chunk]
            key = hashlib.blake2b(key + repr(part).encode(), digest_size=16).digest()
            keys.append(key)
        return keys
