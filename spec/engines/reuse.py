"""Texts that were read before: what target and drafter hold of them is kept, and a call reads only what follows.

A `PromptCache` belongs to the user, who passes it to one call after another. A call takes, for each row, the kept text
with which its prompt has the longest beginning in common, and keeps the row's whole text when it has ended. Copies are
kept, so that engines may come and go. They serve as long as the weights of target and drafter are what they were.
Knows nothing of how rows are laid out.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..proposal import Drafter
from ..request import Held, Request
from ..step import Engine
from ..target.protocol import Resumable, can_resume
from ..target.rope import read_alike
from .module_state import numbers, structure
from .pool import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True, eq=False)
class KeptText:
    """The tokens of a text of which `held` is kept, and the states of target and drafter that it was read with."""

    tokens: list[int]
    rotated: str  # by what kind of frequencies, where these depend on its length (rope.py)
    held: Held
    target: int
    session: int | None  # None: of no drafter's session
    used: int  # when, to know which one to drop

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.held.target) + nbytes_of(self.held.session)


class PromptCache:
    """At most `texts` texts of at most `megabytes` together, the ones used last; freed with their model, too.

    `tokens_read` and `tokens_reused` count the prompts' tokens so far, all but the last of each prompt."""

    def __init__(self, texts: int = 16, megabytes: float = 1024):
        if texts < 1 or not megabytes > 0:
            raise ValueError(f"PromptCache({texts=}, {megabytes=}) would keep nothing; both must be above 0")
        self.texts, self.megabytes = texts, megabytes
        self.tokens_read = self.tokens_reused = 0
        self.lock = threading.RLock()
        self._kept: WeakKeyDictionary[PreTrainedModel, list[KeptText]] = WeakKeyDictionary()
        self._clock = count()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(text.nbytes for texts in self._kept.values() for text in texts)

    def clear(self) -> None:
        """Keep nothing."""
        with self.lock:
            self._kept.clear()

    def of(self, model: "PreTrainedModel", drafter: Drafter, engine: Engine) -> "KeptTexts":
        """What is kept for `model` and `drafter` as they are now. To be called when the engine's weights are packed.

        Raises ValueError where target or drafter cannot go on from a text that was kept."""
        parts: list[tuple[Any, str]] = [(engine.target, f"target {type(model).__name__}")]
        if drafter.traits.remembers:
            parts.append((engine.session, f"drafter {drafter.name!r}"))
        for part, name in parts:
            if not can_resume(part):
                why = "keeps states of whole texts only" if isinstance(part, Resumable) else "has no save_row"
                raise ValueError(f"{name} cannot go on from a text read before (it {why}); leave out reuse=")
        return KeptTexts(self, model, drafter)

    def texts_of(self, model: "PreTrainedModel") -> list[KeptText]:
        """What is kept for `model`, in whatever state."""
        return self._kept.setdefault(model, [])

    def tick(self) -> int:
        return next(self._clock)

    def shrink(self) -> None:
        """Drop the texts that were not used for longest, until count and memory are within bounds."""
        while len(self) > self.texts or self.nbytes > self.megabytes * 1e6:
            texts = min((texts for texts in self._kept.values() if texts), key=lambda texts: min(t.used for t in texts))
            texts.remove(min(texts, key=lambda text: text.used))


class KeptTexts:
    """The texts in a cache that one call can use: those of its model and drafter, with the weights they have now."""

    def __init__(self, cache: PromptCache, model: "PreTrainedModel", drafter: Drafter):
        self.cache, self.model, self.drafter = cache, model, drafter
        self.target = _state([model])
        self.session = _state(modules_of(drafter)) if drafter.traits.remembers else None
        with cache.lock:
            texts = cache.texts_of(model)
            texts[:] = [text for text in texts if text.target == self.target]

    def find(self, request: Request) -> Held | None:
        """What is kept of the longest beginning of a prompt. Two tokens or more are left: one to read, from which heads
        take the last hidden state, and the root of the first tree."""
        tokens = request.tokens
        rotated = read_alike(self.model, len(tokens), request.beside, len(tokens))
        with self.cache.lock:
            usable = [text for text in self.cache.texts_of(self.model) if self._fits(text, rotated)]
            best = max(usable, key=lambda text: _common(text.tokens, tokens), default=None)
            shared = 0 if best is None else max(0, min(_common(best.tokens, tokens), len(tokens) - 2))
            self.cache.tokens_reused += shared
            self.cache.tokens_read += len(tokens) - 1 - shared
            if best is None or not shared:
                return None
            best.used = self.cache.tick()
            return Held(shared, best.held.target, None if self.session is None else best.held.session)

    def _fits(self, text: KeptText, rotated: str | None) -> bool:
        return text.target == self.target and self.session in (None, text.session) and text.rotated == rotated

    def keep(self, engine: Engine) -> None:
        """Keep the texts of all rows of `engine`, which have ended, in place of their beginnings."""
        state = engine.state
        if self.session is not None:
            engine.session.propose(state)  # a step begins by taking in what the last one committed
        with self.cache.lock:
            texts = self.cache.texts_of(self.model)
            for row, length in enumerate(state.lengths.tolist()):
                tokens = state.tokens[row, : max(length - 2, 0)].tolist()
                rotated = read_alike(self.model, int(state.begun[row]), int(state.beside[row]), length)
                if tokens and rotated is not None:
                    held = engine.hold(row, self.session is not None)
                    new = KeptText(tokens, rotated, held, self.target, self.session, self.cache.tick())
                    texts[:] = [text for text in texts if not self._replaces(new, text)] + [new]
            self.cache.shrink()

    def _replaces(self, new: KeptText, old: KeptText) -> bool:
        begins = new.tokens[: len(old.tokens)] == old.tokens
        return begins and new.rotated == old.rotated and old.session in (None, new.session)


def check_reuse(value: Any) -> None:
    """Raise ValueError unless `value` is a `PromptCache` or None."""
    if value is not None and not isinstance(value, PromptCache):
        raise ValueError(
            f"reuse is a {type(value).__name__}; pass one paceline.PromptCache() to all calls that share it"
        )


def _state(modules: Sequence[torch.nn.Module]) -> int:
    return hash(tuple((structure(module), numbers(module)) for module in modules))


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def nbytes_of(saved: Any) -> int:
    """Bytes of the tensors in nested lists and tuples."""
    if isinstance(saved, Tensor):
        return saved.nbytes
    return sum(map(nbytes_of, saved)) if isinstance(saved, (list, tuple)) else 0
