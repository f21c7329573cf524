"""Mixtures: a reproducible stream of raw text from named sources, in given proportions of tokens.

A mixture is a YAML file:

    seed: 0
    sources:
      code: {weight: 3, folder: python, include: ["**/*.py"]}
      wiki: {weight: 1, dataset: wikimedia/wikipedia, name: 20231101.en, split: train}

`folder` is a path, or the name `python` (this interpreter's library and installed packages) or `packages` (the
latter's descriptions and licences). Each document goes to the source that is furthest behind its share of the
tokens given so far, so the shares hold at every moment and not only on average. Knows nothing of training.
"""

import hashlib
import random
import site
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import yaml

from ...spec.console import one_line
from ...spec.data.content import TEXT, kind_of, read_text

_KNOWN = ("python", "packages")
_KEYS = {"weight", "folder", "include", "exclude", "dataset", "name", "split", "column"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where the texts of one part come from: a folder's files, or a column of a streamed data set."""

    weight: float
    folder: str | None = None
    include: tuple[str, ...] = ("**/*.txt", "**/*.md", "**/*.rst", "**/*.py")
    exclude: tuple[str, ...] = ()
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"

    def texts(self, seed: int) -> Iterator[str]:
        """One pass, in an order that the seed decides."""
        if self.folder is not None:
            return _folder_texts(self, seed)
        return _dataset_texts(self, seed)


@dataclass(slots=True)
class Mixture:
    """Iterating yields (source name, text, number of tokens) without end: an exhausted source starts again in another
    order, and `epochs` counts how often.

    With `state_dict` and `load_state_dict` an iteration resumes exactly where another one was."""

    sources: dict[str, Source]
    tokens_of: Callable[[str], int]  # how many tokens a text has
    seed: int = 0
    given: dict[str, int] = field(default_factory=dict)  # tokens so far
    read: dict[str, int] = field(default_factory=dict)  # texts of the present epoch
    epochs: dict[str, int] = field(default_factory=dict)
    _open: dict[str, Iterator[str]] = field(default_factory=dict)

    def __post_init__(self):
        total = sum(source.weight for source in self.sources.values())
        if not total > 0:
            raise ValueError(f"the weights of {', '.join(self.sources) or 'no source'} sum to zero; give one a weight")
        for counts in (self.given, self.read, self.epochs):
            counts.update(dict.fromkeys(self.sources, 0) | counts)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        drawn = {name: source.weight for name, source in self.sources.items() if source.weight > 0}
        while True:
            name = min(drawn, key=lambda name: (self.given[name] / drawn[name], name))
            text = self._next(name)
            tokens = self.tokens_of(text)
            self.given[name] += tokens
            if tokens:
                yield name, text, tokens

    def _next(self, name: str) -> str:
        if name not in self._open:
            self._open[name] = self._pass(name)
            before = sum(1 for _ in islice(self._open[name], self.read[name]))  # skip what was read before
            if before < self.read[name]:
                raise ValueError(f"source {name!r} of the mixture has become shorter; begin again")
        try:
            text = next(self._open[name])
        except StopIteration:
            if not self.read[name]:
                raise ValueError(f"source {name!r} of the mixture holds no text; check it or leave it out") from None
            self.epochs[name] += 1
            self.read[name] = 0
            self._open[name] = self._pass(name)
            text = next(self._open[name])
        self.read[name] += 1
        return text

    def _pass(self, name: str) -> Iterator[str]:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{self.epochs[name]}".encode(), digest_size=7).digest()
        return self.sources[name].texts(int.from_bytes(digest, "little"))

    def state_dict(self) -> dict:
        """What a JSON file can hold."""
        return {"seed": self.seed, "given": {**self.given}, "read": {**self.read}, "epochs": {**self.epochs}}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises ValueError for a state of other sources or another seed."""
        if state["seed"] != self.seed or set(state["given"]) != set(self.sources):
            raise ValueError(
                f"the state is of seed {state['seed']} and sources {', '.join(state['given'])}; the mixture has seed "
                f"{self.seed} and {', '.join(self.sources)}; use the mixture that it was made with"
            )
        self.given, self.read, self.epochs = ({**state[name]} for name in ("given", "read", "epochs"))
        self._open = {}


def load_mixture(path: str | Path, tokens_of: Callable[[str], int]) -> Mixture:
    """Read a mixture's YAML. Raises ValueError for one that says something unknown or nothing."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"mixture {path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict) or not isinstance(data.get("sources"), dict) or set(data) - {"seed", "sources"}:
        raise ValueError(f"mixture {path}: give 'sources', by name, and perhaps 'seed', and nothing else")
    sources = {name: _source(name, settings) for name, settings in data["sources"].items()}
    return Mixture(sources, tokens_of, data.get("seed", 0))


def _source(name: str, settings: dict) -> Source:
    if not isinstance(settings, dict) or set(settings) - _KEYS:
        unknown = sorted(set(settings) - _KEYS) if isinstance(settings, dict) else [settings]
        raise ValueError(f"source {name!r}: {unknown[0]!r} is not known; use {', '.join(sorted(_KEYS))}")
    weight = settings.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise ValueError(f"source {name!r}: weight {weight!r} is no number of at least 0")
    if ("folder" in settings) == ("dataset" in settings):
        raise ValueError(f"source {name!r}: give either a folder or a dataset")
    lists = {key: tuple(settings[key]) for key in ("include", "exclude") if key in settings}
    return Source(**{**settings, **lists})


def _folder_texts(source: Source, seed: int) -> Iterator[str]:
    """Every different text once; files are shuffled, and what is no UTF-8 is left out. Raises ValueError for a file of
    records, which is no text."""
    paths = {
        str(path.relative_to(base)): path
        for base in _folders(source.folder)
        for pattern in source.include
        for path in base.glob(pattern)
        if not any(fnmatch(f"/{path.relative_to(base).as_posix()}", wrong) for wrong in source.exclude)
    }
    names = sorted(paths)
    random.Random(seed).shuffle(names)
    seen: set[bytes] = set()
    for name in names:
        try:
            text = read_text(paths[name])
            kind = kind_of(paths[name])
        except ValueError:
            continue
        if kind != TEXT:
            if source.folder in _KNOWN:
                continue
            raise ValueError(f"{paths[name]} of the mixture holds records; prepare it as a source of its own")
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=12).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


def _folders(name: str) -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = {Path(folder) for folder in [*site.getsitepackages(), sysconfig.get_paths()["purelib"]]}
    known = {"python": [library], "packages": sorted(packages)}
    folders = [folder for folder in known.get(name, [Path(name)]) if folder.is_dir()]
    if not folders:
        raise ValueError(f"folder {name!r} of the mixture does not exist; give a path, 'python' or 'packages'")
    return folders


def _dataset_texts(source: Source, seed: int) -> Iterator[str]:
    import datasets

    try:
        stream = datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=True)
    except Exception as error:  # whatever datasets and the hub raise for a bad source
        detail = one_line(error)
        raise ValueError(
            f"data set {source.dataset!r} cannot be streamed ({type(error).__name__}: {detail})"
        ) from error
    for row in stream.shuffle(seed=seed, buffer_size=1000):
        if source.column not in row:
            raise ValueError(f"data set {source.dataset} has no column {source.column!r}; it has {', '.join(row)}")
        if isinstance(row[source.column], str) and row[source.column].strip():
            yield row[source.column]
