"""The JSON of a request's body, read strictly, so that what follows meets nothing that has no meaning.

JSON as Python reads it may have numbers that no machine's number can be (NaN, 1e999, an integer of 400 digits), strings
with half a character (a lone surrogate), names that come twice, and lists in lists without end. Any of them is refused
here, wherever it stands, in one sentence. Knows nothing of what fields mean.
"""

import json
import math
from typing import Any

from .bodies import BadBody, shown_name

DEEPEST = 32  # lists and objects in one another, in a field
LARGEST = 1 << 64


def read_json(data: bytes) -> Any:
    """What `data` says. Raises BadBody, with the name of the outermost field where there is one."""
    try:
        read = json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except BadBody:
        raise
    except (ValueError, RecursionError):
        raise BadBody(None, "the body is no JSON") from None
    for name, value in read.items() if isinstance(read, dict) else [(None, read)]:
        if name is not None:
            _check_text(None, "the name of a field", name)
        _check(name, "the body" if name is None else shown_name(name), value, 0)
    return read


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise BadBody(None, f"the body names {name[:80]!a} twice in one object; say it once")
        made[name] = value
    return made


def _no_number(said: str) -> Any:
    raise BadBody(None, f"the body has {said}, which is no JSON; give a number")


def _check(field: str | None, name: str, value: Any, depth: int) -> None:
    """Raise BadBody for what has no meaning in `value`, a part of `field`, which `name` tells, in `depth` others."""
    if isinstance(value, (list, dict)) and depth >= DEEPEST:
        raise BadBody(field, f"{name} has more than {DEEPEST} lists and objects in one another; give a flatter one")
    if isinstance(value, str):
        _check_text(field, name, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadBody(field, f"{name} has a number that is too large to be one; give a smaller one")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise BadBody(field, f"{name} has a whole number of more than 64 bits; give a smaller one")
    elif isinstance(value, list):
        for each in value:
            _check(field, name, each, depth + 1)
    elif isinstance(value, dict):
        for key, each in value.items():
            _check_text(field, f"a name in {name}", key)
            _check(field, name, each, depth + 1)


def _check_text(field: str | None, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadBody(field, f"{name} has half a character (a lone surrogate), which no text has") from None
