"""Entries, of which every source is a row, and how one is parsed. Knows nothing of what they say."""

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .content import Unfit, read_text


@dataclass(frozen=True, slots=True)
class Entry:
    """`value` is a line that is not parsed yet, the path of a text, what was said, or why nothing was. `size` is its
    share of `Source.size`."""

    number: int  # from 1
    where: str
    value: Any
    size: int

    def parsed(self) -> Any:
        """What the entry says. Raises Unfit where it cannot be read."""
        if isinstance(self.value, Unfit):
            raise self.value
        if isinstance(self.value, bytes):
            return _parsed_line(self.value)
        if isinstance(self.value, Path):
            try:
                return {"text": read_text(self.value)}
            except ValueError as error:
                raise Unfit("it is no text in UTF-8") from error
        return self.value


def _parsed_line(line: bytes) -> Any:
    try:
        text = line.decode("utf-8").strip()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise Unfit("it is no text in UTF-8") from error
    except RecursionError as error:
        raise Unfit("its JSON is nested too deeply") from error
    except ValueError as error:
        raise Unfit(f"no JSON ({said(error)})") from error
    if "\\u" in text:
        check_encodable(value)
    return value


def said(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return str(error).partition(";")[0].partition(" (")[0]


def check_encodable(value: Any) -> None:
    """Raise Unfit for half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unfit("it holds half of a surrogate pair or is no UTF-8, and so no text") from error
    except RecursionError as error:
        raise Unfit("its JSON is nested too deeply") from error


class Source:
    """A row of entries. Every method raises ValueError, in one sentence, where the source cannot be read."""

    name: str  # as it is spoken of
    has_columns = True  # False where entries are raw texts in any case

    def entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def count(self) -> int:
        return sum(1 for _ in self.entries())

    def some(self, numbers: Collection[int]) -> Iterator[Entry]:
        """The entries with these numbers, which ascend."""
        return (entry for entry in self.entries() if entry.number in numbers)

    def size(self) -> int:
        """What the sizes of all entries add up to, about; in bytes but for data sets."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        raise NotImplementedError


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
