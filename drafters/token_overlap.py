"""Which tokens a target and a draft model with another vocabulary have in common.

A token is the same in both where it stands for the same bytes of text, whatever its id. Vocabularies that differ by
padding, or by tokens that one of them lacks, keep every id; of two tokenizers it is the token-level intersection
(Timor et al., arXiv:2502.05202). Knows nothing of models.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE = "Ġ", "▁"

# Prose, a list, numbers, code and a few other languages: what share of its tokens is in common is told to the user.
SAMPLE = """The committee met on 14 March 2019 to discuss how quickly the river was rising, and who would pay for it.
"I don't think that's right," she said; nobody answered. Photosynthesis converts light, water and carbon dioxide
into sugar and oxygen, which is why plants matter to the climate.

Here are three things to check:

1. **Temperature**: it should stay below 37.5 °C.
2. **Pressure**: 1,013 hPa, plus or minus 20.
3. **Total**: 3 × 248 = 744, so each person gets 186.

```python
def average(numbers: list[float]) -> float:
    if not numbers:
        raise ValueError("nothing to average")
    return sum(numbers) / len(numbers)


for index, value in enumerate(results):
    print(f"{index}: {value:.3f}")
```

Der Bericht wurde gestern veröffentlicht. Le musée est fermé le lundi. El tren sale a las siete y media.
"""


@dataclass(frozen=True, slots=True, eq=False)
class SharedTokens:
    """The tokens in common: the target's ids, the draft's ids of the same tokens, and with which of its own tokens the
    draft reads each token of the target."""

    ids: Tensor  # (V',) ascending
    rows: Tensor  # (V',)
    reads: Tensor  # (V,)
    agree: bool  # no id means one token in one vocabulary and another in the other
    of: int  # how many tokens the target's tokenizer has

    def share_of(self, tokenizer: Any, text: str = SAMPLE) -> float:
        """The share of the tokens of `text` that are in common; of all tokens, where the text has none."""
        tokens, common = tokenizer(text, add_special_tokens=False)["input_ids"], set(self.ids.tolist())
        return sum(token in common for token in tokens) / len(tokens) if tokens else len(common) / max(self.of, 1)


def shared_tokens(tokenizer: Any, draft_tokenizer: Any, size: int, draft_size: int) -> SharedTokens:
    """What a target of `size` ids and a draft model of `draft_size` have in common by their tokenizers.

    Tokens that begin and end a text are the same whatever they are called. Of several ids for the same bytes one is
    drafted. A token of the target's that the draft lacks is read as the last piece into which the draft's tokenizer
    cuts its text, because what comes next depends on that most."""
    texts, draft_texts = _texts(tokenizer, size), _texts(draft_tokenizer, draft_size)
    id_of, draft_id_of = _ids(texts), _ids(draft_texts)
    agree = all(draft_texts.get(token, text) == text for token, text in texts.items())
    same = {token: token for token, text in texts.items() if draft_texts.get(token) == text}
    pairs = {token: draft_id_of[text] for text, token in id_of.items() if text in draft_id_of} | same
    for role in ("bos_token_id", "eos_token_id"):
        token, draft_token = getattr(tokenizer, role, None), getattr(draft_tokenizer, role, None)
        if token in texts and token not in pairs and draft_token in draft_texts.keys() - set(pairs.values()):
            pairs[token] = draft_token
    unknown = _unknown(draft_tokenizer, draft_size)
    reads = torch.full((size,), unknown)
    if agree:
        both = min(size, draft_size)
        reads[:both] = torch.arange(both)
    read = {token: draft_id_of[text] for token, text in texts.items() if text in draft_id_of} | pairs
    lacking = {token: text for token, text in texts.items() if token not in read}
    read |= _last_pieces(lacking, draft_tokenizer, draft_id_of, draft_texts.keys(), unknown)
    reads[torch.tensor([*read], dtype=torch.int64)] = torch.tensor([*read.values()], dtype=torch.int64)
    ids = sorted(pairs)
    rows = [pairs[token] for token in ids]
    common = torch.tensor([ids, rows], dtype=torch.int64)
    return SharedTokens(common[0], common[1], reads, agree, len(texts))


def _texts(tokenizer: Any, size: int) -> dict[int, bytes]:
    """The bytes for which each token below `size` stands; those of special tokens are their names."""
    vocabulary = tokenizer.get_vocab()
    spaces = {space: sum(token[:1] == space for token in vocabulary if isinstance(token, str))
              for space in (_BYTE_LEVEL_SPACE, _SENTENCE_PIECE_SPACE)}  # fmt: skip
    byte_level = spaces[_BYTE_LEVEL_SPACE] > spaces[_SENTENCE_PIECE_SPACE]
    added = tokenizer.added_tokens_decoder
    return {
        index: token if isinstance(token, bytes) else _bytes(token, byte_level, index in added)
        for token, index in vocabulary.items()
        if index < size
    }


def _bytes(token: str, byte_level: bool, added: bool) -> bytes:
    if added:
        return token.encode()
    if byte_level and all(character in _BYTE_OF_CHARACTER for character in token):
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    if one := _ONE_BYTE.fullmatch(token):
        return bytes([int(one[1], 16)])
    return token.replace(_SENTENCE_PIECE_SPACE, " ").encode()


def _ids(texts: dict[int, bytes]) -> dict[bytes, int]:
    """The id of each text. Of several the last: tokens of a single byte, for want of others, come before all words."""
    return {texts[token]: token for token in sorted(texts)}


def _last_pieces(
    lacking: dict[int, bytes], tokenizer: Any, id_of: dict[bytes, int], known: Collection[int], unknown: int
) -> dict[int, int]:
    """For each lacking token the last of the tokens that `tokenizer` makes of its text, or its last byte's where it is
    no text by itself."""
    words, pieces = {}, {}
    for token, text in lacking.items():
        try:
            words[token] = text.decode()
        except UnicodeDecodeError:
            pieces[token] = id_of.get(text[-1:], unknown)
    cut = tokenizer([*words.values()], add_special_tokens=False)["input_ids"] if words else []
    for token, tokens in zip(words, cut):
        pieces[token] = tokens[-1] if tokens and tokens[-1] in known else unknown
    return pieces


def _unknown(tokenizer: Any, size: int) -> int:
    """What the draft reads where there is no text to go by."""
    candidates = (getattr(tokenizer, name, None) for name in ("unk_token_id", "eos_token_id"))
    return next((token for token in candidates if token is not None and token < size), 0)
