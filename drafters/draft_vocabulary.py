"""Fitting a draft model to a target of another vocabulary: what they share by their tokenizers, told once, or refused.

Sizes alone say little: they differ by padding, and are equal by chance. So tokens are compared wherever both tokenizers
are at hand. Knows nothing of drafting.
"""

import sys
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..spec.target.tokenizers import tokenizer_of
from .token_overlap import SharedTokens, shared_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USEFUL = 0.5  # of the tokens of a text: with less in common a chain of drafts gives less than two tokens per step
NEARLY_ALL = 0.99
CHAIN, RIGHT = 4, 0.7  # of the forecast: drafts in a chain, and how many of those that can be made are right

Tokenizers = tuple[Any, Any]  # the target's and the draft's; None for the one that lies with the model
_Sizes = tuple[int, int]
_fitted: "WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, tuple[_Sizes, SharedTokens | None]]]"
_fitted = WeakKeyDictionary()


def fit(
    model: "PreTrainedModel",
    name: str,
    target: "PreTrainedModel",
    tokenizers: Tokenizers = (None, None),
    fetch: bool = False,
) -> SharedTokens | None:
    """What the draft `model` shares with `target`; None where it has the target's own vocabulary, as far as can be
    told. Kept for the two models, unless `tokenizers` are given. The model hub is asked for a tokenizer where there is
    no other way, and with `fetch`.

    Raises ValueError where sizes differ and a tokenizer is not to be had, and where too little is shared."""
    sizes = _size(target), _size(model)
    of_target = _fitted.setdefault(target, WeakKeyDictionary())
    kept = of_target.get(model)
    if kept is None or kept[0] != sizes or tokenizers != (None, None):
        fetch = fetch or sizes[0] != sizes[1]
        both = tuple(given or tokenizer_of(each, fetch) for given, each in zip(tokenizers, (target, model)))
        kept = of_target[model] = sizes, _compared(name, *sizes, *both)
    return kept[1]


def _compared(name: str, size: int, draft_size: int, tokenizer: Any, draft_tokenizer: Any) -> SharedTokens | None:
    if tokenizer is None or draft_tokenizer is None:
        if size == draft_size:
            return None
        whose = "the target's" if tokenizer is None else "its"
        raise ValueError(
            f"drafter {name} has a vocabulary of {draft_size} tokens and the target one of {size}, and {whose} "
            "tokenizer, which would tell what they share, does not lie with the model; give load_drafter both, as "
            "tokenizer= and draft_tokenizer="
        )
    if size == draft_size and tokenizer.get_vocab() == draft_tokenizer.get_vocab():
        return None
    shared = shared_tokens(tokenizer, draft_tokenizer, size, draft_size)
    if size == draft_size and shared.agree:
        return None
    share = shared.share_of(tokenizer)
    if share < USEFUL:
        raise ValueError(
            f"drafter {name} has {share:.0%} of the target's tokens in a sample of text, and below {USEFUL:.0%} its "
            "drafts do not pay; use a draft model with this target's tokenizer, or ngram"
        )
    if not shared.agree or min(share, len(shared.ids) / shared.of) < NEARLY_ALL:
        _say(_told(name, shared, share))
    return shared


def _size(model: "PreTrainedModel") -> int:
    return model.config.get_text_config().vocab_size


def _told(name: str, shared: SharedTokens, share: float) -> str:
    most, likely, with_one = (1 + sum(p**depth for depth in range(1, CHAIN + 1)) for p in (share, RIGHT * share, RIGHT))
    return (
        f"drafter {name} has {'fewer tokens than the target' if shared.agree else 'another tokenizer'}: it drafts "
        f"{len(shared.ids):,} of {shared.of:,}, {share:.1%} of those in a sample of text; a chain of {CHAIN} gives at "
        f"most {most:.1f} tokens per step, and {likely:.1f} (with all tokens {with_one:.1f}) where {RIGHT:.0%} of what "
        "it can draft is right"
    )


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
