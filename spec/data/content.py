"""The bytes of a file: unpacked, decoded, and what kind of content they are.

Content decides and not the suffix, which only tells of a file without any record that it was meant to hold some. Knows
nothing of what records say.
"""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LINES, VALUES, PARQUET, TEXT = "lines", "values", "parquet", "text"
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
LINE_SUFFIXES = (".jsonl", ".ndjson")
PACKED_SUFFIXES = (".gz", ".xz", ".bz2")
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16  # bytes from which the kind is told

_PACKED: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_FOREIGN = {
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "an Arrow file",
}
_OBJECT = re.compile(rb'\{\s*["}]')
_ARRAY = re.compile(rb'\[\s*(\[\s*)?[{"\]]')


class Unfit(ValueError):
    """Why a record cannot be used; it is left out and counted."""


@contextmanager
def unpacked(path: str | Path) -> Iterator[BinaryIO]:
    """The file, unpacked where it is packed by gzip, xz or bzip2. Raises ValueError for one that cannot be read."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is no file; write what it gives to a file, and name that")
    try:
        with open(path, "rb") as raw:
            head = raw.read(6)
        with _opener(head)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
    except OSError as error:
        if error.strerror is None:  # of what unpacks
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _opener(head: bytes) -> Callable[..., Any]:
    return next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), open)


def read_text(path: str | Path) -> str:
    """The text of a file, line ends as \\n. Raises ValueError where it cannot be read or is no UTF-8."""
    with unpacked(path) as file:
        return decoded(file.read(), str(path))


def decoded(data: bytes, name: str) -> str:
    """`data`, the content of `name`, as text without a byte order mark and with \\n as the end of a line."""
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = data.removeprefix(BOM)[error.start]
        raise ValueError(
            f"{name} is no text in UTF-8 (byte 0x{wrong:02x} at {error.start}); convert it, for instance by iconv -f "
            "LATIN1 -t UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def suffix_of(path: str | Path) -> str:
    """The suffix in small letters, that of packing aside: .jsonl of CHATS.JSONL.gz."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def kind_of(path: str | Path) -> str:
    """LINES of JSON, JSON VALUES that go over lines (an array, say), PARQUET, or TEXT. Raises ValueError for a file
    that cannot be read and for one of a kind that is not taken."""
    with unpacked(path) as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return PARQUET
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {kind}; save it as JSON lines or text in UTF-8, plain or packed by gzip or xz")
    lines = [line for line in head.removeprefix(BOM).split(b"\n") if line.strip()]
    if len(head) == HEAD and len(lines) > 1:
        lines.pop()  # it may be cut
    kind = _kind(lines, suffix_of(path) in LINE_SUFFIXES) if lines else TEXT
    return LINES if kind == TEXT and suffix_of(path) in RECORD_SUFFIXES else kind


def _kind(lines: list[bytes], named_lines: bool) -> str:
    """By the first lines of a file that are not blank, and by whether its name says that it holds lines of JSON."""
    first = _json(lines[0])
    if isinstance(first, dict) or (isinstance(first, list) and len(lines) > 1):
        return LINES
    start = b" ".join(lines[:3]).lstrip()
    if _OBJECT.match(start):  # a damaged line, or an object over several lines, whose own are indented
        alone = lines[0].strip() == b"{"
        several = len(lines) == 1 or named_lines or any(line.startswith(b"{") for line in lines[1:])
        return LINES if several and not alone else VALUES
    if _ARRAY.match(start):
        return VALUES
    objects = sum(isinstance(_json(line), dict) for line in lines)
    return LINES if 2 * objects >= len(lines) else TEXT


def _json(line: bytes) -> Any:
    """What a line says; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
