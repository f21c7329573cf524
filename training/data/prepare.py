"""`prepare`: from text and conversations to packed rows on disk, split by document.

The output is a `datasets` folder with the splits `train` and `held_out`, a `paceline.json` with its sources and
settings, and a `prompts.sha256` with a digest of every user turn. It is written atomically, and the same input gives
the same bytes. Knows nothing of drafters.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import datasets

from ...spec.data.content import Unfit
from ...spec.data.entries import Entry, Source
from ...spec.data.reading import Reading
from ...spec.data.sources import open_sources
from ...spec.files import folders_above, write_json
from .documents import Document, Reader, tokenizer_fingerprint
from .mixed import Mixed
from .packing import pack, pieces, plan
from .prompts import DIGESTS, digest, write_digests

VERSION = 3
LENGTH = 1024  # of a row, by default
SAMPLE = 300  # documents from which size is estimated
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("int8")),
        "position_ids": datasets.List(datasets.Value("int32")),
        "document": datasets.List(datasets.Value("int32")),
    }
)
BYTES_PER_TOKEN = 13  # of those four columns
_PIECES = datasets.Features(
    {"tokens": datasets.List(datasets.Value("int32")), "loss": datasets.List(datasets.Value("int8"))}
    | {"held_out": datasets.Value("bool")}
)


@dataclass(frozen=True, slots=True)
class Settings:
    length: int = LENGTH
    held_out: float = 0.02
    seed: int = 0
    tokens: int | None = None  # to take from each mixture among the sources
    columns: dict[str, str] = field(default_factory=dict)  # that stand for fields of ours in records
    split: str = "train"  # of data sets among the sources
    vocabulary: int | None = None  # the target's, beyond which there is no token id

    def __post_init__(self):
        if self.length < 8:
            raise ValueError(f"--length {self.length} is too short for a text; give at least 8 tokens")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out {self.held_out} is no share of at least 0 and below 1")

    def is_held_out(self, key: str) -> bool:
        """Whether a document is held out; depends on its content alone, so that more data does not change it."""
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.held_out * 2**64


def prepare(sources: list[str], out: str | Path, tokenizer, target: str, ends: frozenset[int], settings: Settings):
    """Write the data set `out`; returns what is in its paceline.json.

    Raises ValueError, in one sentence, for sources without a document to learn from, a disk that is too
    small, and a folder `out` that holds something else."""
    reader = Reader(tokenizer, ends, settings.vocabulary)
    out, opened = Path(out), _opened(sources, reader, settings)
    about = {
        "version": VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "target": target,
        "sources": _fingerprints(opened),
        "settings": asdict(settings),
    }
    work = out.parent / f".{out.name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run
    if out.exists():
        return _already(out, about)
    _estimate(reader, opened, out, settings)
    with folders_above(out):
        work.mkdir()
        try:
            counts = _write(reader, opened, work, settings, about)
            write_json(work / "data" / "paceline.json", about | {"counts": counts}, sort_keys=True)
            os.replace(work / "data", out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return about | {"counts": counts}


def _opened(names: list[str], reader: Reader, settings: Settings) -> list[Source]:
    """The sources in the order of their names; a YAML file is a mixture."""
    sources: list[Source] = []
    for name in names:
        if Path(name).suffix in (".yaml", ".yml"):
            sources.append(Mixed(Path(name), settings.tokens, lambda text: len(reader.tokenizer(text)["input_ids"])))
        else:
            sources += open_sources([name], settings.split, settings.columns)
    return sources


def _fingerprints(sources: list[Source]) -> dict[str, str]:
    """By name; sources of one name in several folders are numbered."""
    made: dict[str, str] = {}
    for source in sources:
        twins = sum(source.name == other.name for other in sources[: sources.index(source)])
        made[f"{source.name} {twins + 1}" if twins else source.name] = source.fingerprint()
    return made


def _already(out: Path, about: dict) -> dict:
    try:
        kept = json.loads((out / "paceline.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{out} exists and is no prepared data set; choose another folder") from None
    for name in about:
        if kept.get(name) != about[name]:
            raise ValueError(f"{out} was prepared with another {name}; remove it or choose another folder")
    print(f"{out} is prepared already", file=sys.stderr)
    return kept


def _estimate(reader: Reader, sources: list[Source], out: Path, settings: Settings) -> None:
    """Print how many tokens to expect and what they take on disk, and refuse what does not fit."""
    tokens, documents = 0, 0
    for source in sources:
        if isinstance(source, Mixed):
            tokens += source.tokens
            continue
        entries = list(islice(source.entries(), max(20, SAMPLE // len(sources))))
        sample = Reading(Sample(source.name, entries), settings.columns)
        made = [made for _, made in reader.documents(sample.records()) if isinstance(made, list)]
        share = source.size() / max(1, sum(entry.size for entry in entries))
        tokens += int(sum(len(document.tokens) for document in chain.from_iterable(made)) * max(1.0, share))
        documents += sum(map(len, made))
    disk = tokens * BYTES_PER_TOKEN
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    print(
        f"{', '.join(source.name for source in sources)}: about {tokens:,} tokens (from {documents} documents), "
        f"{disk / 1e6:.0f} MB on disk and twice that while it is made; {free / 1e6:.0f} MB are free",
        file=sys.stderr,
    )
    if 2 * disk > free:
        raise ValueError(f"{out.parent} has {free / 1e6:.0f} MB free and {2 * disk / 1e6:.0f} are needed; make room")


@dataclass(frozen=True)
class Sample(Source):
    """Some entries of a source."""

    name: str
    some: list[Entry]

    def entries(self) -> Iterator[Entry]:
        return iter(self.some)


def _documents(reader: Reader, sources: list[Source], settings: Settings) -> Iterator[list[Document]]:
    """The documents of each record; what is left out is said source by source."""
    for source in sources:
        reading = Reading(source, settings.columns)
        for record, made in reader.documents(reading.records()):
            if isinstance(made, Unfit):
                reading.reject(record, str(made))
            else:
                yield made
        reading.finish()


def _write(reader: Reader, sources: list[Source], work: Path, settings: Settings, about: dict) -> dict:
    digests: set[str] = set()
    counts = {split: {"documents": 0, "tokens": 0, "loss_tokens": 0} for split in ("train", "held_out")}
    print_of = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def all_pieces():
        for document in chain.from_iterable(_documents(reader, sources, settings)):
            held_out = settings.is_held_out(document.key)
            count = counts["held_out" if held_out else "train"]
            count["documents"] += 1
            digests.update(map(digest, document.turns))
            for start, stop in pieces(len(document.tokens), settings.length):
                tokens, loss = document.tokens[start:stop], document.loss[start:stop]
                if len(tokens) > 1 and any(loss[1:]):
                    count["tokens"] += len(tokens)
                    count["loss_tokens"] += sum(loss)
                    yield {"tokens": tokens, "loss": loss, "held_out": held_out}

    made = _arrow(all_pieces, _PIECES, work, "pieces" + print_of)
    if not counts["train"]["loss_tokens"]:
        raise ValueError(
            "the sources hold no document with a token to learn from outside of what is held out; give more of them, "
            "or a smaller --held-out"
        )
    held_out = made["held_out"][:]
    lengths = [len(tokens) for tokens in made.with_format("numpy")["tokens"]]
    splits = {}
    for split, wanted in (("train", False), ("held_out", True)):
        chosen = [piece for piece, is_held_out in enumerate(held_out) if is_held_out == wanted]
        rows = plan([lengths[piece] for piece in chosen], settings.length)

        def packs(rows=rows, chosen=chosen):
            for row in rows:
                parts = [made[chosen[item]] for item in row]
                yield pack([(part["tokens"], part["loss"]) for part in parts], settings.length)

        counts[split]["rows"] = len(rows)
        if not rows:
            continue  # an empty split could not be read again
        splits[split] = _arrow(packs, FEATURES, work, split + print_of)
    datasets.DatasetDict(splits).save_to_disk(work / "data")
    write_digests(work / "data" / DIGESTS, digests)
    return counts


def _arrow(generator, features: datasets.Features, work: Path, fingerprint: str) -> datasets.Dataset:
    """What `generator` yields, in Arrow files under `work`."""
    path = work / f"{fingerprint}.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=features, writer_batch_size=200) as writer:
        for row in generator():
            writer.write(row)
        rows, _ = writer.finalize()
    if not rows:
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    made = datasets.Dataset.from_file(str(path))
    made._fingerprint = fingerprint  # else a random one is written beside the data
    return made
