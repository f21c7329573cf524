"""Numbers among arguments: those of numpy and torch become Python's; what means nothing is refused in a sentence."""

import math
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

# Arguments that are whole numbers, with the least allowed value.
_WHOLE: Mapping[str, int] = MappingProxyType(
    {
        "max_new_tokens": 1,
        "max_length": 1,
        "min_new_tokens": 0,
        "min_length": 0,
        "num_return_sequences": 1,
        "top_k": 0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
    }
)
# Arguments that are real numbers, with the least and the largest allowed value.
_REAL: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "top_h": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "typical_p": (0.0, 1.0),
        "epsilon_cutoff": (0.0, 1.0),
        "eta_cutoff": (0.0, 1.0),
        "repetition_penalty": (0.0, math.inf),
        "encoder_repetition_penalty": (0.0, math.inf),
        "max_time": (0.0, math.inf),
    }
)


def plain(value: Any) -> Any:
    """Scalars and arrays of numpy and torch, also in lists, as Python's numbers and lists; anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def checked_numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numeric arguments in `values`, checked and converted to int and float."""
    given = {name: value for name, value in values.items() if value is not None}
    whole = {name: whole_number(name, given[name], _WHOLE[name]) for name in given.keys() & _WHOLE.keys()}
    return whole | {name: _real_number(name, given[name], *_REAL[name]) for name in given.keys() & _REAL.keys()}


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, an integer of Python, numpy or torch, as an int. Raises ValueError for one below `least` and for
    anything else, True and False included."""
    number = _index(value)
    if number is None or number < least:
        unit = " token" if least == 1 and "tokens" in name else ""
        raise ValueError(
            f"{name}={value!r} is not a whole number of at least {least}{unit}; pass such a number, or leave it out"
        )
    return number


def _real_number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if _is_bool(value) or isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not low <= number <= high or number == math.inf:
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is not a number {bounds}; pass such a number, or leave it out")
    return number


def check_seed(seed: Any) -> int | list[int] | None:
    """The seed as int, list of int or None. Raises ValueError for anything else."""
    if seed is None:
        return None
    several = isinstance(seed, (list, tuple)) or getattr(seed, "ndim", 0) == 1
    parts = list(seed) if several else [seed]
    numbers = [number for number in map(_index, parts) if number is not None]
    if len(numbers) < len(parts):
        raise ValueError(
            f"seed={seed!r} is neither an integer nor a list of integers; pass one, one for each row, or leave it out"
        )
    return numbers if several else numbers[0]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _index(value: Any) -> int | None:
    """`value` as an int; None where it is no integer, and for True and False."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return None
