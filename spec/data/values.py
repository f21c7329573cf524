"""JSON values that go over lines: an array of records, or objects one behind the other. Knows nothing of files."""

import json
import re
from collections.abc import Iterator
from typing import Any

from .entries import said

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class Damaged(ValueError):
    """The text is no JSON from some place on."""


def values(text: str) -> Iterator[tuple[Any, int, int]]:
    """Each value with where it begins and ends: of an array its elements, but of one that is a conversation itself.

    Raises Damaged, with a reason and the line, behind the last whole value of a text that is no JSON."""
    position = _beyond_space(text, 0)
    while position < len(text):
        if text[position] != "[" or _is_message(_first(text, position)):
            value, end = _value(text, position)
            yield value, position, end
            position = _beyond_space(text, end)
            continue
        position = _beyond_space(text, position + 1)
        while not text.startswith("]", position):
            value, end = _value(text, position)
            yield value, position, end
            position = _beyond_space(text, end)
            if text.startswith(",", position):
                position = _beyond_space(text, position + 1)
            elif not text.startswith("]", position):
                raise _damaged(text, position, "',' or ']' is missing")
        position = _beyond_space(text, position + 1)


def _value(text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError:
        raise _damaged(text, position, "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _damaged(text, error.pos, error.msg) from error
    except ValueError as error:  # a number of too many digits
        raise _damaged(text, position, said(error)) from error


def _damaged(text: str, position: int, reason: str) -> Damaged:
    line = text.count("\n", 0, position) + 1
    return Damaged(f"{reason}, line {line}")


def _beyond_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _first(text: str, position: int) -> Any:
    """The first value of the array at `position`; None where it cannot be told."""
    try:
        return _DECODER.raw_decode(text, _beyond_space(text, position + 1))[0]
    except (ValueError, RecursionError):
        return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())
