"""What a streamed model is, and what its streaming has cost so far. Knows nothing of how weights are fetched."""

from dataclasses import dataclass
from typing import Literal, NoReturn

Kind = Literal["disk", "host"]


class StreamError(ValueError):
    """Why weights could not be fetched, in one sentence. Where that ended a call of `generate`, `output` is what the
    call would have returned of the text until then, with its trace."""

    output: object = None


class Uncopied:
    """What holds open files, or memory that others fill. A copy of the model that it is in would share these."""

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise ValueError("a streamed model cannot be copied, as its weights are not in memory; load it a second time")

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            "a streamed model cannot be pickled, as its weights are not in memory; load it where it is used"
        )


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """Counts since the model was loaded; the difference of two is what happened between them."""

    forwards: int = 0
    waited_seconds: float = 0.0  # in which a forward stood still for weights
    read_seconds: float = 0.0  # in which weights were being fetched
    bytes_read: int = 0

    def __sub__(self, other: "StreamRecord") -> "StreamRecord":
        return StreamRecord(
            self.forwards - other.forwards,
            self.waited_seconds - other.waited_seconds,
            self.read_seconds - other.read_seconds,
            self.bytes_read - other.bytes_read,
        )

    @property
    def bandwidth(self) -> float:
        """Bytes a second while something was being fetched; 0.0 where nothing was."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0


@dataclass(frozen=True, slots=True)
class StreamAbout:
    """How a model is streamed."""

    kind: Kind
    layers: int
    resident_layers: int
    bytes_per_forward: int  # that are fetched
    resident_bytes: int  # of weights in memory: resident layers, LM head, small parameters and buffers
    buffers: int
    direct: bool  # past the page cache
