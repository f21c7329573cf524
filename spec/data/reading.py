"""Reading a source: its records, all of them or some spread evenly, with account of what was left out and why.

Each entry becomes a record or is left out, with a reason that is counted; a source of which nothing can be used is an
error. Knows nothing of what records are for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import TypeVar

from .content import Unfit
from .entries import Entry, Source
from .forms import EXAMPLE, Record, record

SHOWN = 5  # reasons

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Unusable:
    """An entry that cannot be used, and why."""

    location: str
    reason: str


class Reading:
    """The reading of a source once, by `records`, `each` or `spread`; `columns` are those of `parse_columns`."""

    def __init__(self, source: Source, columns: Mapping[str, str] | None = None):
        self.source, self.columns = source, (columns or {}) if source.has_columns else {}
        self.key: Callable | None = None
        self._begin()

    def _begin(self) -> None:
        self.forms: Counter[str] = Counter()  # of the records that were taken
        self.reasons: Counter[str] = Counter()  # of those left out
        self.first: dict[str, tuple[str, str]] = {}  # reason: where it was met first, and in full
        self.keys: set[object] = set()

    @property
    def taken(self) -> int:
        return self.forms.total()

    @property
    def left_out(self) -> int:
        return self.reasons.total()

    def records(self) -> Iterator[Record]:
        """All records that there are. The caller ends with `finish`, after `reject` for those that it cannot use."""
        for entry in self.source.entries():
            made = self._made(entry, lambda record: record)
            if isinstance(made, Record):
                yield made

    def reject(self, record: Record, reason: str) -> None:
        """Count a record as left out that was given as taken."""
        self.forms[record.form] -= 1
        self._leave_out(record.where, reason)

    def each(self, convert: Callable[[Record], Made]) -> Iterator[Made | Unusable]:
        """What `convert` makes of each record, and in their places those left out; it raises Unfit for what it cannot
        use. Ends with `finish`."""
        for entry in self.source.entries():
            yield self._made(entry, convert)
        self.finish()

    def spread(
        self, most: int | None, convert: Callable[[Record], Made], key: Callable[[Made], object] | None = None
    ) -> list[Made]:
        """What `convert` makes of `most` records spread evenly, or of all; only these are parsed, unless one of them
        cannot be used: then those that can are taken. No two have the same `key`."""
        self.key = key
        count = self.source.count() if most is not None else 0
        if most is not None and most < count:
            numbers = dict.fromkeys(number * count // most + 1 for number in range(most))
            made = [self._made(entry, convert) for entry in self.source.some(numbers)]
            if not self.left_out:
                self._say(f"{most:,} of {count:,} records, spread evenly")
                return [one for one in made if not isinstance(one, Unusable)]
            self._begin()
        usable = [one for one in self.each(convert) if not isinstance(one, Unusable)]
        most = min(len(usable), most or len(usable))
        return [usable[number * len(usable) // most] for number in range(most)]

    def finish(self) -> None:
        """Say what was read as what, and what was left out. Raises ValueError where nothing could be used."""
        total, reasons = self.taken + self.left_out, self._reasons()
        if not total:
            raise ValueError(f"{self.source.name} holds no records; each line of it is one, such as {EXAMPLE}")
        if not self.taken:
            raise ValueError(
                f"{self.source.name}: none of its {total:,} records can be used ({'; '.join(reasons[:2])}); give some "
                f"such as {EXAMPLE}, or name their fields by --columns"
            )
        self._say(f"{self.taken:,} of {total:,} records")
        for reason in reasons[:SHOWN]:
            print(f"  left out {reason}", file=sys.stderr)
        if rest := sum(count for _, count in self.reasons.most_common()[SHOWN:]):
            print(f"  left out {rest:,} for {len(reasons) - SHOWN} other reasons", file=sys.stderr)

    def _say(self, counts: str) -> None:
        forms = [form for form, count in self.forms.most_common() if count]
        print(f"{self.source.name}: read as {' and '.join(forms)}, {counts}", file=sys.stderr)

    def _reasons(self) -> list[str]:
        """The commonest first."""
        said = []
        for kind, count in self.reasons.most_common():
            where, reason = self.first[kind]
            said.append(f"{count:,}, {'the first ' * (count > 1)}in {where}: {reason}")
        return said

    def _made(self, entry: Entry, convert: Callable[[Record], Made]) -> Made | Unusable:
        try:
            one = record(entry.parsed(), entry.number, entry.where, self.columns)
            made = convert(one)
            if self.key is not None:
                self._check_new(self.key(made))
        except Unfit as error:
            self._leave_out(entry.where, str(error))
            return Unusable(f"{self.source.name}:{entry.number}", str(error))
        self.forms[one.form] += 1
        return made

    def _check_new(self, key: object) -> None:
        if key in self.keys:
            raise Unfit("the same came before")
        self.keys.add(key)

    def _leave_out(self, where: str, reason: str) -> None:
        reason = shorten("".join(letter if letter.isprintable() else " " for letter in reason), 160)
        kind = reason.partition(" (")[0]
        self.reasons[kind] += 1
        self.first.setdefault(kind, (where, reason))
