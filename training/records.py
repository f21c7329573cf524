"""Append-only JSONL that survives a kill at any moment, and small JSON files written atomically.

A line is complete when its line break is on the disk; an incomplete last line is removed when the file is opened
again. Knows nothing of what the lines mean.
"""

import json
import os
from pathlib import Path


class Journal:
    """Appends JSON objects to `path`, one a line, each synced to disk before `add` returns. The first makes the file.

    `records` are those already in the file. Raises ValueError for a file that holds anything else."""

    def __init__(self, path: str | Path):
        self.path, self.file = Path(path), None
        self.records: list[dict] = []
        if self.path.exists():
            self._open()
            try:
                self.records = list(self._whole_lines())
            except ValueError:
                self.close()
                raise

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")  # noqa: SIM115 (kept open, closed by `close`)

    def _whole_lines(self):
        self.file.seek(0)
        end = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}: no JSON ({error}); it was not written here, choose another file"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}, line {number}: no JSON object; choose another file")
            end += len(line)
            yield record
        self.file.truncate(end)

    def add(self, record: dict) -> None:
        if self.file is None:
            self._open()
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def clear(self) -> None:
        """Forget all records."""
        if self.file is not None:
            self.file.truncate(0)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def shown(value):
    """`value` with absolute paths, also nested ones, replaced by their last part, for files that are published."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shown(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
