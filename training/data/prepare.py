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
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets

from ...spec.files import folders_above, write_json
from .documents import (
    Document,
    Reader,
    Unfit,
    file_fingerprint,
    read_records,
    source_files,
    tokenizer_fingerprint,
    unpacked_size,
)
from .mixture import load_mixture
from .packing import pack, pieces, plan
from .prompts import DIGESTS, digest, write_digests

VERSION = 2
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
    length: int = 1024
    held_out: float = 0.02
    seed: int = 0
    tokens: int | None = None  # to take from each mixture among the sources

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
    out, files = Path(out), source_files(sources)
    about = {
        "version": VERSION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "target": target,
        "sources": {path.name: file_fingerprint(path) for path in files},
        "settings": asdict(settings),
    }
    work = out.parent / f".{out.name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run
    if out.exists():
        return _already(out, about)
    reader = Reader(tokenizer, ends)
    if settings.tokens is None and any(map(_is_mixture, files)):
        raise ValueError("a mixture has no end; say with --tokens how many tokens to take of it")
    _estimate(reader, files, out, settings)
    with folders_above(out):
        work.mkdir()
        try:
            counts = _write(reader, files, work, settings, about)
            write_json(work / "data" / "paceline.json", about | {"counts": counts}, sort_keys=True)
            os.replace(work / "data", out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return about | {"counts": counts}


def _is_mixture(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _records(files: list[Path], reader: Reader, settings: Settings) -> Iterator[dict | Unfit]:
    """Everything in the files; of a mixture as many tokens as are asked for."""
    for path in files:
        if not _is_mixture(path):
            yield from read_records([path])
            continue
        mixture = load_mixture(path, lambda text: len(reader.tokenizer(text)["input_ids"]))
        for _, text, _ in mixture:
            yield {"text": text}
            if sum(mixture.given.values()) >= settings.tokens:
                break
        for name, given in mixture.given.items():
            print(f"{path.name}: {given:,} tokens of {name}, {mixture.epochs[name]} times through", file=sys.stderr)


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


def _estimate(reader: Reader, files: list[Path], out: Path, settings: Settings) -> None:
    """Print how many tokens to expect and what they take on disk, and refuse what does not fit."""
    mixtures = sum(map(_is_mixture, files))
    files = [path for path in files if not _is_mixture(path)]
    sample, seen = [], 0
    for record in islice(read_records(files), SAMPLE):
        seen += len(json.dumps(record, ensure_ascii=False).encode()) if isinstance(record, dict) else 0
        sample += [record] if isinstance(record, dict) else []
    made = [document for document in reader.documents(sample) if isinstance(document, Document)]
    size = sum(map(unpacked_size, files))
    tokens = int(sum(len(made_document.tokens) for made_document in made) * max(1.0, size / max(seen, 1)))
    tokens += mixtures * (settings.tokens or 0)
    disk = tokens * BYTES_PER_TOKEN
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists())).free
    also = f" and {mixtures} mixtures" if mixtures else ""
    print(
        f"{len(files)} files of {size / 1e6:.1f} MB{also}: about {tokens:,} tokens (from {len(made)} documents), "
        f"{disk / 1e6:.0f} MB on disk and twice that while it is made; {free / 1e6:.0f} MB are free",
        file=sys.stderr,
    )
    if 2 * disk > free:
        raise ValueError(f"{out.parent} has {free / 1e6:.0f} MB free and {2 * disk / 1e6:.0f} are needed; make room")


def _write(reader: Reader, files: list[Path], work: Path, settings: Settings, about: dict) -> dict:
    unfit: dict[str, int] = {}
    digests: set[str] = set()
    counts = {split: {"documents": 0, "tokens": 0, "loss_tokens": 0} for split in ("train", "held_out")}
    print_of = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def all_pieces():
        records = (record for record in _records(files, reader, settings) if _fit(record, unfit))
        for document in reader.documents(records):
            if not _fit(document, unfit):
                continue
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
    for reason, number in sorted(unfit.items()):
        print(f"left out {number} records: {reason}", file=sys.stderr)
    if not counts["train"]["loss_tokens"]:
        raise ValueError(
            f"the sources hold no document with a token to learn from ({sum(unfit.values())} records were left out"
            f"{', ' + max(unfit, key=unfit.get) if unfit else ''}); give conversations with answers, or text"
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


def _fit(record, unfit: dict[str, int]) -> bool:
    if not isinstance(record, Unfit):
        return True
    reason = str(record).split(": ", 1)[-1]
    unfit[reason] = unfit.get(reason, 0) + 1
    return False


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
