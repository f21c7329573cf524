"""Files on this machine: the cache folder, and writing a file atomically."""

import json
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
    """Yields a temporary path beside `path`; what the block writes there replaces `path` when the block ends.

    After an error the old file is unchanged; after a kill it is either the old one or the complete new one, because the
    new file is synced to disk before it is renamed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, value: dict, sort_keys: bool = False) -> None:
    """Write a JSON file by `whole`."""
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8")
