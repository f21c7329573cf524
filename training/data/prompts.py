"""Prompts for data generation: reading, excluding and identifying them.

A prompt is a list of user turns, optionally after a system turn; answers in the source are ignored, because the target
gives its own. Its id is a hash of its content, so that a source may grow or be reordered between two runs. Knows
nothing of how answers are made.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...spec.console import waiting

DIGESTS = "prompts.sha256"  # beside prepared data and in drafter folders


@dataclass(frozen=True, slots=True)
class Prompt:
    turns: tuple[str, ...]  # the user's
    system: str | None
    source: str

    @property
    def id(self) -> str:
        content = json.dumps([self.system, *self.turns], ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Unusable:
    """An entry of a source that is no prompt, and why."""

    location: str
    reason: str


def prompt_entries(source: str, split: str = "train") -> Iterator[Prompt | Unusable]:
    """Prompts of a JSONL file, a `datasets` folder or a hub id, with `turns`, `messages` or `prompt` in each entry.

    Raises ValueError for a source that cannot be read at all."""
    name = Path(source).stem if Path(source).exists() else source
    empty = True
    for number, entry in enumerate(_entries(source, split), 1):
        empty = False
        location = f"{name}:{number}"
        yield Unusable(location, entry.reason) if isinstance(entry, Unusable) else _prompt(entry, name, location)
    if empty:
        raise ValueError(f"{source} holds no prompts; give a file with at least one line")


def _entries(source: str, split: str) -> Iterator[dict | Unusable]:
    if Path(source).is_file():
        with open(source, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.strip():
                    yield _parsed(line)
        return
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
            yield from loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            with waiting(f"reading data set {source}"):
                loaded = datasets.load_dataset(source, split=split)
            yield from loaded
    except Exception as error:  # whatever datasets and the hub raise for a bad source
        detail = " ".join(str(error).split())[:200]
        raise ValueError(
            f"prompts {source!r}: no file, and no data set with a split {split!r} ({type(error).__name__}: {detail}); "
            "check the path"
        ) from error


def _parsed(line: str) -> dict | Unusable:
    try:
        entry = json.loads(line)
    except ValueError as error:
        return Unusable("", f"no JSON ({error})")
    return entry if isinstance(entry, dict) else Unusable("", "no JSON object")


def _prompt(entry: dict, source: str, location: str) -> Prompt | Unusable:
    system = None
    if "messages" in entry:
        messages = entry["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            return Unusable(location, "'messages' is no list of objects with 'role' and 'content'")
        turns = [message.get("content") for message in messages if message["role"] == "user"]
        system = next((message.get("content") for message in messages if message["role"] == "system"), None)
    elif "turns" in entry:
        turns = entry["turns"]
    elif "prompt" in entry:
        turns = [entry["prompt"]]
    else:
        return Unusable(location, "none of 'turns', 'messages' and 'prompt'")
    if not isinstance(turns, list) or not turns:
        return Unusable(location, "no user turn")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return Unusable(location, "a user turn is empty or no text")
    return Prompt(tuple(turns), system, str(entry.get("source", source)))


def read_beginnings(path: str) -> list[str]:
    """The lines of a text file, each the beginning of user turns that the target is to invent."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"beginnings {path} cannot be read ({error}); give a text file with one on a line") from error
    beginnings = [line.rstrip() for line in lines if line.strip()]
    if not beginnings:
        raise ValueError(f"{path} holds no beginnings of turns; write one on each line")
    return beginnings


def normal(text: str) -> str:
    """`text` normalised for comparison: without differences of case and white space."""
    return " ".join(text.casefold().split())


def turns_of(path: str) -> set[str]:
    """All user turns of a file of prompts, normalised, to be kept out of training data."""
    return {normal(turn) for prompt in prompt_entries(path) if isinstance(prompt, Prompt) for turn in prompt.turns}


def digest(turn: str) -> str:
    """A user turn as listed in `prompts.sha256`: 64 bits of the SHA-256 of the normalised turn."""
    return hashlib.sha256(normal(turn).encode()).hexdigest()[:16]


def write_digests(path: str | Path, digests: set[str]) -> None:
    Path(path).write_text("".join(f"{line}\n" for line in sorted(digests)), encoding="utf-8")


def read_digests(folder: str | Path) -> set[str] | None:
    """The digests of the user turns that the data or the drafter in `folder` comes from; None where unrecorded."""
    path = Path(folder) / DIGESTS
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def sift(entries: Iterable[Prompt | Unusable], excluded: set[str]) -> Iterator[Prompt | Unusable]:
    """All entries in order; repeated prompts and prompts with a turn in `excluded` become Unusable."""
    seen: set[str] = set()
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, Prompt):
            location = f"{entry.source}:{number}"
            if any(normal(turn) in excluded for turn in entry.turns):
                entry = Unusable(location, "excluded: a turn is in the exclusion file")
            elif entry.id in seen:
                entry = Unusable(location, "the same prompt came before")
            else:
                seen.add(entry.id)
        yield entry


def user_prefix(tokenizer) -> str:
    """What the chat template writes before a first user turn."""
    if not tokenizer.chat_template:
        raise ValueError("--source self needs a tokenizer with a chat template and this one has none; give prompts")
    mark = "\u241f?\u241f"  # nothing that a template would alter or contain
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    before, separator, _ = text.partition(mark)
    if not separator:
        raise ValueError("--source self: the chat template does not write the user's turn as it is; give prompts")
    return before
