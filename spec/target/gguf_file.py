"""A GGUF file, read with care: its settings and where its tensors lie, and every count and place checked.

Nothing is believed that does not fit into the file, so a damaged one is refused before anything is allocated or given
to other readers. Knows nothing of models and of what blocks mean.
"""

import hashlib
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..console import one_line

Setting = int | float | bool | str
_HEADER = struct.Struct("<4sIQQ")
_VERSIONS = (2, 3)
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")))
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
_TOKENS = b"tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file, its axes in torch's order."""

    name: str
    kind: str  # the name of its type
    shape: tuple[int, ...]
    start: int  # in the file
    size: int  # bytes

    @property
    def numbers(self) -> int:
        return prod(self.shape)


class GgufError(ValueError):
    """What is wrong with a file, in one sentence."""


class GgufFile:
    """An open GGUF file. Raises GgufError for what is none and for a damaged one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.settings: dict[str, Setting] = {}  # without arrays
        self.lengths: dict[str, int] = {}  # of the arrays
        self.tensors: dict[str, StoredTensor] = {}
        self._spans: dict[str, tuple[int, int]] = {}  # of settings in the file
        try:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise GgufError(f"GGUF file {path} cannot be read ({error}); give a file that can") from error
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as error:
            raise self.damaged(f"its header is damaged or cut off: {error}") from error

    def damaged(self, why: str) -> GgufError:
        return GgufError(f"GGUF file {self.path} cannot be used ({why:.240}); fetch it again")

    def raw(self, tensor: StoredTensor) -> np.ndarray:
        """The bytes of a tensor (rows, bytes of a row), on the file's own memory; rows are all axes but the last."""
        flat = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.start)
        return flat.reshape(prod(tensor.shape[:-1]), -1)

    def forget(self) -> None:
        """Let go of the memory in which parts of the file have been seen so far; they can be seen again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    def digest(self) -> str:
        """A SHA-256 of all settings."""
        return hashlib.sha256(self._bytes[_HEADER.size : max(end for _, end in self._spans.values())]).hexdigest()

    def outline(self, tokenizer: bool) -> bytes:
        """A small GGUF file with the same settings, in which each tensor is one number. Without the `tokenizer`, which
        then is one of one token, it takes other readers milliseconds; with it, seconds."""
        arrays = () if tokenizer else {name for name in self.lengths if name.startswith("tokenizer.")}
        kept = [span for name, span in self._spans.items() if name not in arrays]
        parts = [_HEADER.pack(b"GGUF", 3, len(self.tensors), len(kept) + (not tokenizer))]
        parts += [self._bytes[start:end] for start, end in kept]
        if not tokenizer:
            parts.append(struct.pack(f"<Q{len(_TOKENS)}sIIQQs", len(_TOKENS), _TOKENS, _ARRAY, _STRING, 1, 1, b"a"))
        for text in map(str.encode, self.tensors):
            parts.append(struct.pack(f"<Q{len(text)}sIQIQ", len(text), text, 1, 1, 0, 0))
        alignment = int(self.settings.get("general.alignment", 32))
        size = sum(map(len, parts))
        return b"".join(parts) + bytes(-size % alignment + 4)

    def _read_header(self) -> None:
        if len(self._bytes) < _HEADER.size or self._bytes[:4] != b"GGUF":
            raise GgufError(f"{self.path} is no GGUF file, as it does not begin with GGUF; give one that is")
        _, version, tensors, settings = _HEADER.unpack_from(self._bytes)
        if version not in _VERSIONS:
            raise self.damaged(f"it is of version {version} and those that are read are {_VERSIONS}")
        place = _HEADER.size
        # 13 bytes: a name's length, a type and a value; 32: a name's length, one axis, a type and a place.
        if settings * 13 + tensors * 32 > len(self._bytes):
            raise self.damaged(f"it is too short for {settings} settings and {tensors} tensors")
        for _ in range(settings):
            place = self._read_setting(place)
        entries = []
        for _ in range(tensors):
            entry, place = self._read_entry(place)
            entries.append(entry)
        alignment = self.settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"its general.alignment is {alignment} and no power of two")
        data = (place + alignment - 1) // alignment * alignment
        for name, axes, kind, offset in entries:
            self._place(name, axes, kind, data, offset)
        if sum(tensor.size for tensor in self.tensors.values()) > len(self._bytes):
            raise self.damaged("its tensors overlap")

    def _read_setting(self, begun: int) -> int:
        name, place = self._text(begun)
        if name in self._spans:
            raise self.damaged(f"it has {name!r} twice")
        (kind,) = struct.unpack_from("<I", self._bytes, place)
        place += 4
        if kind == _STRING:
            self.settings[name], place = self._text(place)
        elif kind == _ARRAY:
            kind, count = struct.unpack_from("<IQ", self._bytes, place)
            self.lengths[name], place = count, self._skip_array(place + 12, kind, count)
        else:
            form = self._scalar(kind)
            (self.settings[name],) = struct.unpack_from(form, self._bytes, place)
            place += struct.calcsize(form)
        self._spans[name] = begun, place
        return place

    def _scalar(self, kind: int) -> str:
        if not _SCALARS.get(kind):
            raise self.damaged(f"a setting is of the unknown type {kind}")
        return f"<{_SCALARS[kind]}"

    def _skip_array(self, place: int, kind: int, count: int) -> int:
        least = 8 if kind == _STRING else struct.calcsize(self._scalar(kind))
        if place + count * least > len(self._bytes):
            raise self.damaged(f"it is too short for an array of {count}")
        if kind != _STRING:
            return place + count * least
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            place += 8 + length(self._bytes, place)[0]
        return place

    def _read_entry(self, place: int) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        name, place = self._text(place)
        (axes,) = struct.unpack_from("<I", self._bytes, place)
        if not 1 <= axes <= _MOST_AXES:
            raise self.damaged(f"tensor {name!r} has {axes} axes")
        *sizes, kind, offset = struct.unpack_from(f"<{axes}QIQ", self._bytes, place + 4)
        return (name, tuple(reversed(sizes)), kind, offset), place + 16 + 8 * axes

    def _place(self, name: str, shape: tuple[int, ...], kind: int, data: int, offset: int) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if name in self.tensors:
            raise self.damaged(f"it has tensor {name!r} twice")
        try:
            named = GGMLQuantizationType(kind)
            width, size = GGML_QUANT_SIZES[named]
        except (ValueError, KeyError):
            raise GgufError(
                f"GGUF file {self.path} cannot be used (tensor {name!r} is of type {kind}, which is unknown to the "
                "installed package gguf); fetch it again, or upgrade gguf"
            ) from None
        numbers, start = prod(shape), data + offset
        if not numbers or shape[-1] % width:
            raise self.damaged(f"tensor {name!r} of type {named.name} has the shape {shape}")
        bytes_of_all = numbers // width * size
        if start + bytes_of_all > len(self._bytes):
            end = start + bytes_of_all
            raise self.damaged(f"tensor {name!r} would end at byte {end} and the file has {len(self._bytes)}")
        self.tensors[name] = StoredTensor(name, named.name, shape, start, bytes_of_all)

    def _text(self, place: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._bytes, place)
        place += 8
        if place + length > len(self._bytes):
            raise self.damaged(f"it is too short for a text of {length} bytes")
        return self._bytes[place : place + length].decode(), place + length


@contextmanager
def opened(path: str | Path) -> Iterator[GgufFile]:
    """A GGUF file; what goes wrong with it in the block becomes a ValueError of one sentence."""
    try:
        yield GgufFile(path)
    except GgufError:
        raise
    except Exception as error:  # whatever transformers raises for a file that it does not know or understand
        detail = one_line(error)
        raise ValueError(
            f"GGUF file {path} cannot be loaded ({type(error).__name__}: {detail}); see whether transformers reads "
            "its architecture from GGUF"
        ) from error
