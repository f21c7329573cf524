"""The text of tokens as they come, and where it contains a stop string.

A token may be a part of a character: what is incomplete is held back until the character is whole. Knows nothing of
rows and steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoders give for bytes that are no character yet


class RunningText:
    """`text` is what all tokens so far say, but for an incomplete character at its end; it ends before the first stop
    string."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.text, self.stopped = tokenizer, tuple(stops), "", False
        self.tokens: list[int] = []
        self.lengths: list[int] = []  # [token]: of the text with it
        self._before, self._read = 0, 0  # tokens that the next ones are decoded behind, and those whose text is known

    def put(self, token: int) -> bool:
        """Add a token; returns whether a stop string is complete with it, behind which nothing is to be added."""
        self.tokens.append(token)
        known, whole = self._decoded(self.tokens[self._before : self._read]), self._decoded(self.tokens[self._before :])
        if len(whole) > len(known) and not whole.endswith(INCOMPLETE):
            self._extend(whole[len(known) :])
            self._before, self._read = self._read, len(self.tokens)
        self.lengths.append(len(self.text))
        return self.stopped

    def end(self) -> None:
        """No more tokens will come: what is incomplete stays so."""
        if not self.stopped:
            known = self._decoded(self.tokens[self._before : self._read])
            self._extend(self._decoded(self.tokens[self._before :])[len(known) :])

    @property
    def shown(self) -> str:
        """The text but for an end that may become a stop string."""
        if self.stopped:
            return self.text
        lengths = (
            length
            for stop in self.stops
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1)
            if self.text.endswith(stop[:length])
        )
        return self.text[: len(self.text) - max(lengths, default=0)]

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _extend(self, more: str) -> None:
        begun = max(0, len(self.text) - max(map(len, self.stops), default=0) + 1)
        self.text += more
        starts = [start for stop in self.stops if (start := self.text.find(stop, begun)) >= 0]
        if starts:
            self.text, self.stopped = self.text[: min(starts)], True
