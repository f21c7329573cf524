"""Files as sources: of lines of JSON, of JSON values, of texts. Knows nothing of what entries say."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .content import BOM, Unfit, unpacked
from .entries import Entry, Source, check_encodable, file_fingerprint
from .values import Damaged, values


@dataclass(frozen=True)
class Lines(Source):
    """A file with JSON on each line."""

    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.name

    def entries(self) -> Iterator[Entry]:
        number = 0
        with unpacked(self.path) as file:
            for line_number, line in enumerate(file, 1):
                line = line.removeprefix(BOM) if line_number == 1 else line
                if line.strip():
                    number += 1
                    yield Entry(number, f"line {line_number}", line, len(line))

    def size(self) -> int:
        with unpacked(self.path) as file:
            return file.seek(0, 2)

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


class Values(Lines):
    """A file with one JSON array of entries, or with JSON values that go over lines."""

    def entries(self) -> Iterator[Entry]:
        with unpacked(self.path) as file:  # bytes that are no UTF-8 spoil an entry and not the file
            text = file.read().removeprefix(BOM).decode("utf-8", errors="surrogateescape")
        line, counted = 1, 0
        try:
            for number, (value, start, end) in enumerate(values(text), 1):
                line, counted = line + text.count("\n", counted, start), start
                yield Entry(number, f"line {line}", _encodable(value), end - start)
        except Damaged as error:
            raise ValueError(
                f"{self.path} looks like JSON records and is none ({error}); mend it, or write one record on each "
                "line, of which damaged ones are left out"
            ) from error


def _encodable(value: Any) -> Any:
    try:
        check_encodable(value)
    except Unfit as error:
        return error
    return value


@dataclass(frozen=True)
class Texts(Source):
    """Text files, each an entry."""

    name: str
    paths: tuple[Path, ...]
    has_columns = False

    def entries(self) -> Iterator[Entry]:
        for number, path in enumerate(self.paths, 1):
            yield Entry(number, path.name, path, path.stat().st_size)

    def count(self) -> int:
        return len(self.paths)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> str:
        whole = hashlib.sha256()
        for path in self.paths:
            whole.update(f"{path.name} {file_fingerprint(path)}\n".encode())
        return whole.hexdigest()
