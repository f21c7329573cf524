"""What is asked for: a prompt to continue, with settings of its own. Knows nothing of models.

A request says all that its text depends on, so that whoever else is being served, and whenever it comes, it gets the
text that it would get alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..inputs.numbers import check_seed, checked_numbers, whole_number
from ..noise import SILENT, stream_key
from ..request import Request, RowSampling
from ..state import MOST_BIASED

ENDS = 16  # ends of text that a request can have
MOST_LOGPROBS = 20
MOST_STOPS = 16  # strings


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Continue `prompt`, a text or token ids, by at most `max_new_tokens` tokens.

    `temperature` 0 is greedy; else tokens are drawn with `seed` (None: one is drawn, and told with the result), from
    the `top_k` likeliest (0: all), of the nucleus `top_p`, at least `min_p` times as likely as the likeliest. `choice`
    tells several texts of one prompt and seed apart. `repetition_penalty` (as in transformers) counts all tokens of the
    text, `presence_penalty` and `frequency_penalty` (OpenAI's) new ones; `logit_bias` is added to scores before them.

    The text ends with one of `end_ids` (None: the model's), or where it contains one of the strings `stop`, for which a
    tokenizer is needed. `logprobs` asks for each token's log-probability and those of the so many likeliest tokens,
    `prompt_logprobs` for those of the prompt. Prompt lookup copies from `prediction`, too. Requests of several
    `tenant`s take turns."""

    prompt: str | Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    choice: int = 0
    stop: Sequence[str] = ()
    end_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prediction: str | Sequence[int] = ()
    tenant: str = ""

    def checked(self) -> "TextRequest":
        """The request with Python's numbers and a seed. Raises ValueError for a setting that means nothing."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        numbers: dict[str, Any] = dict(checked_numbers({name: getattr(self, name) for name in names}))
        for name in ("presence_penalty", "frequency_penalty"):
            numbers[name] = _finite(name, getattr(self, name))
        if not numbers["repetition_penalty"] > 0:
            raise ValueError("repetition_penalty=0 divides by nothing; pass a number above 0, or leave it out")
        if not numbers["top_p"] > 0:
            raise ValueError("top_p=0 leaves no token; pass a number above 0 and at most 1, or leave it out")
        least = 0 if self.prompt_logprobs is not None else 1
        numbers["max_new_tokens"] = whole_number("max_new_tokens", self.max_new_tokens, least)
        numbers["choice"] = whole_number("choice", self.choice, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                numbers[name] = _at_most(name, whole_number(name, getattr(self, name), 0), MOST_LOGPROBS)
        seed = check_seed(self.seed)
        if isinstance(seed, list):
            raise ValueError(f"seed={self.seed!r} is a list; a request has one seed")
        numbers["seed"] = int(torch.randint(2**53, ())) if seed is None else seed
        return replace(self, **numbers, logit_bias=_bias(self.logit_bias), stop=_stops(self.stop))

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def for_row(
        self, tokens: list[int], model_ends: Sequence[int], vocabulary: int, predicted: Sequence[int] = ()
    ) -> Request:
        """What a row of the batch is given, for a request that was checked, of which `tokens` are the prompt, and
        `predicted` the prediction; `model_ends` end the text where the request does not say what does.

        Raises ValueError for too many ends of text, and for ends and biases of tokens that there are not."""
        ends = tuple(dict.fromkeys(model_ends if self.end_ids is None else map(int, self.end_ids)))
        if len(ends) > ENDS:
            raise ValueError(f"end_ids names {len(ends)} tokens; at most {ENDS} can end a text")
        named = {"end_ids (for clients stop_token_ids)": {*ends} - {*model_ends}, "logit_bias": self.logit_bias}
        for name, ids in named.items():
            if beyond := [token for token in ids if not 0 <= token < vocabulary]:
                raise ValueError(f"{name} names token {beyond[0]}, and the vocabulary ends at {vocabulary - 1}")
        draws = self.temperature > 0  # else the first of the best tokens is taken, which none of these settings is for
        sampling = RowSampling(
            temperature=self.temperature if draws else 1.0,
            top_k=min(self.top_k or vocabulary + 1, vocabulary + 1) if draws else vocabulary + 1,
            tail=1 - self.top_p if draws else 0.0,
            min_p=self.min_p if draws else 0.0,
            repetition=self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
            bias=tuple(self.logit_bias.items()),
        )
        assert self.seed is not None, "the request was checked"
        key = stream_key(self.seed, self.choice) if draws else SILENT
        return Request(tokens, self.max_new_tokens, key, ends, sampling, predicted=tuple(predicted))


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} is not a number; pass one, or leave it out")
    return number


def _at_most(name: str, number: int, most: int) -> int:
    if number > most:
        raise ValueError(f"{name}={number} is more than {most}; ask for at most that many")
    return number


def _bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping) or len(bias) > MOST_BIASED:
        raise ValueError(f"logit_bias must map at most {MOST_BIASED} token ids to numbers; pass such a mapping")
    return {whole_number("logit_bias", token, 0): _finite("logit_bias", value) for token, value in bias.items()}


def _stops(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MOST_STOPS or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop={stop!r} must be at most {MOST_STOPS} strings, none of them empty; pass such strings")
    return strings
