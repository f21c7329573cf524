"""The sources that names stand for: files, folders, data sets. Knows nothing of what entries say."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from .content import LINES, PARQUET, RECORD_SUFFIXES, TEXT, VALUES, Unfit, kind_of, suffix_of
from .data_sets import DataSet, Parquet
from .entries import Source
from .files import Lines, Texts, Values
from .forms import record
from .values import Damaged

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".tex", ".html")
_TABLES = (".csv", ".tsv")
FIRST = 8  # entries of a file in a folder among which a record is looked for
Columns = Mapping[str, str]  # of fields, as forms.parse_columns gives them

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


def open_sources(names: Iterable[str | Path], split: str = "train", columns: Columns | None = None) -> list[Source]:
    """As `open_source`, with the files in folders in order of their names; text files of a folder are one source. Says
    on stderr what files of a folder are of other kinds: those that hold no records, by `columns` or of a known form."""
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and not _is_data_set(path):
            sources += _in_folder(path, columns or {})
        else:
            sources.append(open_source(name, split))
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


def _in_folder(folder: Path, columns: Columns) -> list[Source]:
    texts: list[Path] = []
    sources: list[Source] = []
    others: Counter[str] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if suffix_of(path) not in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            others[path.suffix or path.name] += not hidden
            continue
        try:
            source = _file(path)
        except ValueError:
            if suffix_of(path) in RECORD_SUFFIXES:
                raise
            others[path.suffix] += 1  # a text that is coded otherwise
            continue
        if not isinstance(source, Texts) and _holds_records(source, columns):
            sources.append(source)
        elif suffix_of(path) in TEXT_SUFFIXES:  # whatever it begins with
            texts.append(path)
        else:
            others[path.suffix] += 1
    if others.total():
        kinds = ", ".join(sorted(kind for kind, count in others.items() if count))
        print(f"{folder.name}: left out {others.total()} files of other kinds ({kinds})", file=sys.stderr)
    return ([Texts(folder.name, tuple(texts))] if texts else []) + sources


def _holds_records(source: Source, columns: Columns) -> bool:
    """Whether any of a file's first entries is a record; settings, such as a package.json, and lists of numbers are
    none. Raises ValueError for a file that cannot be read."""
    try:
        for entry in islice(source.entries(), FIRST):
            with suppress(Unfit):
                record(entry.parsed(), entry.number, entry.where, columns)
                return True
    except ValueError as error:
        if not isinstance(error.__cause__, Damaged):  # JSON with comments, perhaps
            raise
    return False
