"""Prompts for data generation: reading, excluding and identifying them.

A prompt is a list of user turns, optionally after a system turn; answers in the source are ignored, because the target
gives its own. Its id is a hash of its content, so that a source may grow or be reordered between two runs. Knows
nothing of how answers are made.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...spec.data.content import read_text
from ...spec.data.forms import Record
from ...spec.data.reading import Reading, Unusable
from ...spec.data.sources import open_source
from ...spec.prompts import user_turns

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


def prompt_entries(
    name: str, split: str = "train", columns: Mapping[str, str] | None = None
) -> Iterator[Prompt | Unusable]:
    """Prompts of a file or data set, and in their places what is none.

    Raises ValueError for a source that cannot be read at all, and at its end for one without a prompt."""
    source = Path(name).stem if Path(name).exists() else name

    def prompt(record: Record) -> Prompt:
        return Prompt(user_turns(record), record.system, source if record.source is None else record.source)

    return Reading(open_source(name, split), columns).each(prompt)


def read_beginnings(path: str) -> list[str]:
    """The lines of a text file, each the beginning of user turns that the target is to invent."""
    beginnings = [line.rstrip() for line in read_text(path).split("\n") if line.strip()]
    if not beginnings:
        raise ValueError(f"{path} holds no beginnings of turns; write one on each line")
    return beginnings


def normal(text: str) -> str:
    """`text` normalised for comparison: without differences of case and white space."""
    return " ".join(text.casefold().split())


def turns_of(name: str) -> set[str]:
    """All user turns of a source of prompts, normalised, to be kept out of training data."""
    return {normal(turn) for prompt in prompt_entries(name) if isinstance(prompt, Prompt) for turn in prompt.turns}


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
