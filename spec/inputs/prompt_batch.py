"""The prompts of a call of `generate`, from transformers' batch of columns to texts of rows, and back.

Rows hold no padding. Where the model's own forward has read the prompts, a text may begin with tokens that nobody
named: those of embeddings, or of a cache handed in. Knows nothing of how texts are decoded.
"""

from dataclasses import dataclass

from torch import Tensor

from ..prompts import left_padding
from ..proposal import NO_TOKEN
from ..target.given import GivenPrompt


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """B prompts of `width` columns, padded on the left, the last of which have the token ids `ids` (B, P)."""

    ids: Tensor
    pads: Tensor  # (B,): columns of `ids` before a row's text; negative: tokens of the text that `ids` does not name
    given: GivenPrompt | None = None

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, given: GivenPrompt | None) -> "PromptBatch":
        if given is not None:
            return cls(ids, given.pads - (given.width - ids.shape[1]), given)
        return cls(ids, ids.new_zeros(len(ids)) if mask is None else left_padding(mask.to(ids.device)))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.ids.shape[1] - int(self.pads.min())

    def texts(self) -> list[list[int]]:
        """The tokens of each row, NO_TOKEN where nobody named them."""
        rows = zip(self.ids.tolist(), self.pads.tolist())
        return [[NO_TOKEN] * max(-pad, 0) + row[max(pad, 0) :] for row, pad in rows]

    def assembled(self, tokens: Tensor, counts: list[int], pad: int | None) -> Tensor:
        """The batch as transformers returns it, (B, P + longest): `ids` and the first `counts` tokens behind each text
        of `tokens` (B, capacity); rows that ended are padded on the right."""
        width = self.ids.shape[1]
        out = self.ids.new_full((len(self.ids), width + max(counts)), 0 if pad is None else pad)
        out[:, :width] = self.ids
        for row, count in enumerate(counts):
            start = width - int(self.pads[row])
            out[row, width : width + count] = tokens[row, start : start + count]
        return out
