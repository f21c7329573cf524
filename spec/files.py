"""Files on this machine: where the cache is, and how a file is written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PACELINE_CACHE") or Path(base) / "paceline")


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path`: what is written there within the block takes its place at the end of it.

    An error leaves the old file, a kill the old one or the new one, which is on the disk before it has its name."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
