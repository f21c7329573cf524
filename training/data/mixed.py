"""A mixture as a source of records: so many tokens of it. Knows nothing of what is made of them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ...spec.data.entries import Entry, Source, file_fingerprint
from .mixture import load_mixture


class Mixed(Source):
    """The first `tokens` tokens of the mixture in a YAML file, each text an entry."""

    has_columns = False

    def __init__(self, path: Path, tokens: int | None, tokens_of: Callable[[str], int]):
        if tokens is None:
            raise ValueError("a mixture has no end; say with --tokens how many tokens to take of it")
        load_mixture(path, tokens_of)
        self.name, self.path, self.tokens, self.tokens_of = path.name, path, tokens, tokens_of

    def entries(self) -> Iterator[Entry]:
        mixture = load_mixture(self.path, self.tokens_of)
        for number, (name, text, _) in enumerate(mixture, 1):
            yield Entry(number, name, {"text": text}, 1)
            if sum(mixture.given.values()) >= self.tokens:
                break
        for name, given in mixture.given.items():
            print(f"{self.name}: {given:,} tokens of {name}, {mixture.epochs[name]} times through", file=sys.stderr)

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)
