"""The bodies of requests, in OpenAI's form: what is asked for, or one sentence that says which field is wrong, and why.

A field that is not supported is refused by its name, never ignored. Knows nothing of sockets and models.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..state import MOST_BIASED
from .row_sampler import MOST_TOP_K
from .text_request import ENDS, MOST_LOGPROBS

MOST_STOPS = 4
LONGEST_NAME = 80  # characters of a field's name that an answer says


class BadBody(ValueError):
    """A request that cannot be answered; `field` is what is wrong with it, `status` that of the answer."""

    def __init__(self, field: str | None, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.field, self.status, self.code = None if field is None else field[:LONGEST_NAME], status, code


Check = Callable[[str, Any], Any]


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not low <= value <= high:
            raise BadBody(name, f"{name}={_shown(value)} is not a number from {low:g} to {high:g}")
        return float(value)

    return check


def whole(low: int, high: float) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON has one kind of number
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high:,}"
            raise BadBody(name, f"{name}={_shown(value)} is not a whole number {bounds}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadBody(name, f"{name}={_shown(value)} is neither true nor false")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadBody(name, f"{name}={_shown(value)} is no text")
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or len(several) > MOST_STOPS:
        raise BadBody(name, f"{name} is no text and no list of at most {MOST_STOPS} texts")
    if not all(text(name, each) for each in several):
        raise BadBody(name, f"{name} has an empty text, which would end every answer at once")
    return tuple(several)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) >= ENDS:
        raise BadBody(name, f"{name} is no list of fewer than {ENDS} token ids")
    return tuple(whole(0, math.inf)(name, each) for each in value)


def biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MOST_BIASED:
        raise BadBody(name, f"{name} is no object of at most {MOST_BIASED} token ids with numbers")
    try:
        tokens = [int(token) if token.isdecimal() and token.isascii() else -1 for token in value]
    except ValueError:  # more digits than Python reads
        tokens = [-1]
    if min(tokens, default=0) < 0 or len({*tokens}) < len(tokens):
        raise BadBody(name, f"{name} has a key that is no token id, or has one twice")
    return dict(zip(tokens, (number(-100, 100)(name, bias) for bias in value.values())))


def stream_options(name: str, value: Any) -> dict[str, bool]:
    return _object(name, value, dict.fromkeys(("include_usage", "continuous_usage_stats", "include_drafts"), flag))


def messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadBody(name, f"{name} is no list of at least one message")
    return [_message(f"{name}[{index}]", each) for index, each in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, str]:
    given = _object(name, value, {"role": text, "content": content})
    role = given.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise BadBody(f"{name}.role", f"{name}.role={_shown(role)} is none of system, developer, user and assistant")
    if "content" not in given:
        raise BadBody(f"{name}.content", f"{name} has no content")
    return {"role": "system" if role == "developer" else role, "content": given["content"]}


def content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return text(name, value)
    if not isinstance(value, list) or not value:
        raise BadBody(name, f"{name} is no text and no list of parts")
    parts = [_object(f"{name}[{index}]", part, {"type": text, "text": text}) for index, part in enumerate(value)]
    for index, part in enumerate(parts):
        if part.get("type") != "text" or "text" not in part:
            raise BadBody(f"{name}[{index}]", f"{name}[{index}] is no part of type text, and only those are supported")
    return "\n".join(part["text"] for part in parts)


def prompts(name: str, value: Any) -> list[str | list[int]]:
    several = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    made: list[str | list[int]] = []
    for each in several:
        if isinstance(each, list):
            made.append([whole(0, math.inf)(name, token) for token in each])
        else:
            made.append(text(name, each))
        if not made[-1]:
            raise BadBody(name, f"{name} is empty; give at least one token")
    if len(made) > MOST_PROMPTS:
        raise BadBody(name, f"{name} has {len(made)} prompts; send at most {MOST_PROMPTS} at a time")
    return made


def prediction(name: str, value: Any) -> str:
    given = _object(name, value, {"type": text, "content": content})
    if given.get("type") != "content" or "content" not in given:
        raise BadBody(name, f"{name} is no object of type content with a content")
    return given["content"]


def only(*allowed: Any) -> Check:
    """A field of which nothing but what happens anyway can be asked."""

    def check(name: str, value: Any) -> Any:
        alike = (value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)
        if not any(alike):
            raise BadBody(name, f"{name}={_shown(value)} is not supported; leave {name} out")
        return value

    return check


def _object(name: str, value: Any, fields: Mapping[str, Check]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadBody(name, f"{name} is no object")
    made = {}
    for key, each in value.items():
        if key not in fields:
            if each is None:
                continue
            said = shown_name(key)
            raise BadBody(f"{name}.{said}", f"{name}.{said} is not supported; leave it out")
        if each is not None:
            made[key] = fields[key](f"{name}.{key}", each)
    return made


def shown_name(name: str) -> str:
    """A field's name, cut and in one line."""
    return ascii(name[:LONGEST_NAME])[1:-1]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


MOST_PROMPTS = 128
_COMMON: dict[str, Check] = {
    "model": text,
    "temperature": number(0, 100),
    "top_p": number(1e-6, 1),
    "top_k": whole(-1, MOST_TOP_K),
    "min_p": number(0, 1),
    "repetition_penalty": number(1e-3, 100),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": biases,
    "seed": whole(-(2**63), 2**64),
    "n": whole(1, 128),
    "stop": strings,
    "stop_token_ids": token_ids,
    "ignore_eos": flag,
    "stream": flag,
    "stream_options": stream_options,
    "user": text,
    "max_tokens": whole(0, math.inf),
    "prediction": prediction,
}
CHAT: dict[str, Check] = {
    **_COMMON,
    "messages": messages,
    "max_completion_tokens": whole(1, math.inf),
    "logprobs": flag,
    "top_logprobs": whole(0, MOST_LOGPROBS),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "tool_choice": only("none"),
    "modalities": only(["text"]),
    "service_tier": only("auto", "default"),
    "store": only(False),
}
COMPLETION: dict[str, Check] = {
    **_COMMON,
    "prompt": prompts,
    "echo": flag,
    "logprobs": whole(0, MOST_LOGPROBS),
    "best_of": only(1),
    "suffix": only(""),
}


@dataclass(frozen=True, slots=True)
class Body:
    """The fields of a request, those that are null left out."""

    chat: bool
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, body: Any, chat: bool) -> "Body":
        """Raises BadBody for a body that is no object, and for its first field that cannot be served."""
        if not isinstance(body, dict):
            raise BadBody(None, "the body is no JSON object")
        known, made = CHAT if chat else COMPLETION, {}
        for name, value in body.items():
            if value is None:
                continue
            if name not in known:
                raise BadBody(name, f"{_shown(name)} is not supported; leave it out")
            made[name] = known[name](name, value)
        needed = "messages" if chat else "prompt"
        if needed not in made:
            raise BadBody(needed, f"{needed} is missing")
        if "stream_options" in made and not made.get("stream"):
            raise BadBody("stream_options", "stream_options are of answers that are streamed; set stream to true")
        if "top_logprobs" in made and not made.get("logprobs"):
            raise BadBody("top_logprobs", "top_logprobs needs logprobs to be true")
        if made.get("max_tokens") == 0 and not made.get("echo"):
            raise BadBody("max_tokens", "max_tokens=0 asks for nothing; give at least 1")
        return cls(chat, made)

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    @property
    def new_tokens(self) -> int | None:
        """How many are asked for; None where the body does not say."""
        return self.get(self.limit_name)

    @property
    def limit_name(self) -> str:
        """The field that says it."""
        return "max_completion_tokens" if "max_completion_tokens" in self.fields else "max_tokens"

    @property
    def logprobs(self) -> int | None:
        if self.chat:
            return self.get("top_logprobs", 0) if self.get("logprobs") else None
        return self.get("logprobs")

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of a `TextRequest` that have the same meaning."""
        names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
        made = {name: self.fields[name] for name in names if name in self.fields}
        return made | {"temperature": self.get("temperature", 1.0), "top_k": max(self.get("top_k", 0), 0)}

    def ends(self, ids: list[int]) -> tuple[int, ...]:
        """The ends of text, where `ids` are the model's."""
        return (*(() if self.get("ignore_eos") else ids), *self.get("stop_token_ids", ()))
