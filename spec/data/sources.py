"""The sources that names stand for: files, folders, data sets. Knows nothing of what entries say."""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .content import LINES, PARQUET, RECORD_SUFFIXES, TEXT, VALUES, Unfit, kind_of, suffix_of
from .data_sets import DataSet, Parquet
from .entries import Source
from .files import Lines, Texts, Values
from .forms import record

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".tex", ".html")
_TABLES = (".csv", ".tsv")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def open_source(name: str | Path, split: str = "train") -> Source:
    """The file or data set `name`; of a data set the split. Raises ValueError where there is none."""
    path = Path(name)
    if path.is_dir():
        if not _is_data_set(path):
            raise ValueError(f"{name} is a folder and no data set; give a file of records")
        return DataSet(str(name), split)
    if not path.exists():
        if suffix_of(path) in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *_TABLES) or not _HUB_ID.fullmatch(str(name)):
            raise ValueError(f"{name} does not exist; give a file, or the hub id of a data set (owner/name)")
        return DataSet(str(name), split)
    return _file(path)


def open_sources(names: Iterable[str | Path], split: str = "train") -> list[Source]:
    """As `open_source`, with the files in folders in order of their names; text files of a folder are one source. Says
    on stderr what files of a folder are of other kinds."""
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        sources += _in_folder(path) if path.is_dir() and not _is_data_set(path) else [open_source(name, split)]
    return sources


def _is_data_set(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _file(path: Path) -> Source:
    kind = kind_of(path)
    if kind == TEXT:
        if suffix_of(path) in _TABLES:
            raise ValueError(f"{path} is a table of text; save it as JSON lines or Parquet, and name its --columns")
        return Texts(path.name, (path,))
    return {LINES: Lines, VALUES: Values, PARQUET: Parquet}[kind](path)


def _in_folder(folder: Path) -> list[Source]:
    texts: list[Path] = []
    sources: list[Source] = []
    others: Counter[str] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if suffix_of(path) not in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            others[path.suffix or path.name] += not hidden
            continue
        source = _file(path)
        if isinstance(source, Texts):
            texts.append(path)
        elif _is_settings(source):
            others[path.suffix] += 1
        else:
            sources.append(source)
    if others.total():
        kinds = ", ".join(sorted(kind for kind, count in others.items() if count))
        print(f"{folder.name}: left out {others.total()} files of other kinds ({kinds})", file=sys.stderr)
    return ([Texts(folder.name, tuple(texts))] if texts else []) + sources


def _is_settings(source: Source) -> bool:
    """Whether a file of a folder is one JSON object that is no record, such as a package.json."""
    if not isinstance(source, Lines):
        return False
    entries = source.entries()
    first = next(entries, None)
    if first is None or next(entries, None) is not None:
        return False
    try:
        record(first.parsed(), 1, "", {})
    except Unfit:
        return True
    return False
