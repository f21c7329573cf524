"""Data sets of the library `datasets` as sources, and Parquet files. Knows nothing of what entries say."""

import glob
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..console import one_line, waiting
from .entries import Entry, Source, file_fingerprint


class DataSet(Source):
    """A data set of the library `datasets`: a folder of it, a Parquet file, or an id of the hub with perhaps the name
    of a subset, `owner/name:subset`."""

    def __init__(self, name: str, split: str = "train"):
        self.name, self.split = name, split

    @cached_property
    def rows(self):
        import datasets

        path = Path(self.name)
        if not path.is_dir():
            hub_id, _, subset = self.name.partition(":")
            with waiting(f"reading data set {self.name}"):
                return self._opened(lambda: datasets.load_dataset(hub_id, subset or None, split=self.split))
        loaded = self._opened(lambda: datasets.load_from_disk(str(path)))
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if self.split not in loaded:
            raise ValueError(f"{self.name} has no split {self.split!r}; give --split {' or '.join(loaded)}")
        return loaded[self.split]

    def _opened(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as error:  # whatever datasets and the hub raise for a bad source
            detail = one_line(error)
            raise ValueError(
                f"{self.name!r}: no file, and no data set with a split {self.split!r} ({type(error).__name__}: "
                f"{detail}); check the path"
            ) from error

    def entries(self) -> Iterator[Entry]:
        return self._entries(iter(self.rows), 1)

    def some(self, numbers: Collection[int]) -> Iterator[Entry]:
        for number in numbers:
            yield next(self._entries(iter(self.rows.skip(number - 1)), number))

    def _entries(self, rows: Iterator[dict], first: int) -> Iterator[Entry]:
        number = first
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever pyarrow raises for a damaged file
                detail = one_line(error)
                raise ValueError(f"{self.name} is damaged at row {number} ({detail}); fetch it again") from error
            yield Entry(number, f"row {number}", row, 1)
            number += 1

    def count(self) -> int:
        return len(self.rows)

    def size(self) -> int:
        return self.count()

    def fingerprint(self) -> str:
        return self.rows._fingerprint


class Parquet(DataSet):
    """A Parquet file, read as a stream: nothing is copied into a cache."""

    def __init__(self, path: Path):
        super().__init__(path.name)
        self.path = path

    @cached_property
    def rows(self):
        import datasets

        files = {"train": glob.escape(str(self.path))}
        return self._opened(lambda: datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))

    def _opened(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except Exception as error:
            detail = one_line(error)
            raise ValueError(f"{self.path} is damaged ({detail}); fetch it again") from error

    def count(self) -> int:
        from pyarrow import parquet

        return self._opened(lambda: parquet.read_metadata(self.path).num_rows)

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)
