"""The run file of `paceline bench`: JSON lines, appended as the bench goes, from which reports are computed.

The first line is the header (version, setup, methods, machine, versions, command, commit, weights in bytes); every
other line is one `Record`: one turn of one prompt by one method. Lines of a batch share its time. What can be read of
a file that was cut, mixed or written by two is read, and what was left out is counted. Knows nothing of models.
"""

import contextlib
import io
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import lock
from ..trace import Event, Fetched

VERSION = 1


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a text leaves its baseline's, and how close the two best tokens' scores are there."""

    position: int  # counted in generated tokens from 0
    margin: float
    spacing: float  # of the dtype's numbers at that size


@dataclass(slots=True)
class Record:
    """One turn of a prompt by a method. `seconds` is its batch's, from the call of generate to the texts."""

    prompt: str
    category: str
    turn: int
    method: str
    repeat: int
    batch: int  # which batch of prompts: those lines share `seconds`
    rows: int  # how many
    seconds: float
    prompt_tokens: int
    tokens: list[int]
    identical: bool | None  # to the baseline's text; None for the baseline and where seeds do not compare
    difference: Difference | None = None
    events: list[Event] = field(default_factory=list)
    pieces: dict[str, str] = field(default_factory=dict)  # token id: text, for the prompts that reports show
    memory: int | None = None  # bytes at the peak, where the device counts them

    @property
    def key(self) -> tuple:
        return self.prompt, self.turn, self.method, self.repeat

    @property
    def group(self) -> tuple:
        """The call of generate that it comes from."""
        return self.batch, self.turn, self.method, self.repeat

    def line(self) -> str:
        """Events as [step, tokens, tree, accepted, bonus, seconds], trees and names of phases kept once; what was
        fetched of streamed weights stands behind."""
        trees: list[list[int]] = []
        phases = list(dict.fromkeys(phase for event in self.events for phase in event.seconds))
        rows = []
        for event in self.events:
            if event.parents not in trees:
                trees.append(event.parents)
            seconds = [round(event.seconds.get(phase, 0.0), 7) for phase in phases]
            tree = trees.index(event.parents)
            fetched = [] if event.fetched is None else [event.fetched.bytes, round(event.fetched.seconds, 7)]
            rows.append([event.step, event.tokens, tree, event.accepted, event.bonus, seconds, *fetched])
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in ("events", "difference")}
        difference = self.difference and asdict(self.difference)
        trace = {"trees": trees, "phases": phases, "events": rows}
        return json.dumps({**fields, "difference": difference, "trace": trace}, separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, data: dict) -> "Record":
        """Raises ValueError, KeyError or TypeError for what `line` did not write."""
        trace, fields = data["trace"], dict(data)
        del fields["trace"]
        fields["difference"] = fields["difference"] and Difference(**fields["difference"])
        group = "/".join(map(str, (fields["batch"], fields["turn"], fields["method"], fields["repeat"])))
        events = []
        for step, tokens, tree, accepted, bonus, seconds, *rest in trace["events"]:
            times, fetched = dict(zip(trace["phases"], seconds)), Fetched(*rest) if rest else None
            events.append(Event(0, step, tokens, trace["trees"][tree], accepted, bonus, times, group, fetched))
        if fields["seconds"] <= 0 or fields["rows"] < 1 or not isinstance(fields["tokens"], list):
            raise ValueError("a time that is not above 0, or no tokens")
        return cls(**fields, events=events)


@dataclass(slots=True)
class Run:
    """A run file as read: complete batches only."""

    path: str
    header: dict
    records: list[Record]
    left_out: dict[str, int] = field(default_factory=dict)  # reason: lines

    @property
    def warning(self) -> str | None:
        if not self.left_out:
            return None
        counts = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{self.path}: left out {sum(self.left_out.values())} lines ({counts})"

    @property
    def methods(self) -> list[dict]:
        return self.header["methods"]

    def of(self, method: str) -> list[Record]:
        return [record for record in self.records if record.method == method]


def read_run(path: str | Path) -> Run:
    """Read what is whole in a run file. Raises ValueError where it has no header of this version or no record."""
    run = _read(path)[0]
    if not run.records:
        raise ValueError(f"{path} holds no complete measurement; let paceline bench go on with it")
    return run


def _read(path: str | Path) -> tuple[Run, int]:
    """The run, and how many bytes from the start are whole: behind them is at most a batch that was cut off."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"run file {path} cannot be read ({error.strerror}); make one with paceline bench") from error
    lines = data.splitlines(keepends=True)
    if not lines:
        raise ValueError(f"run file {path} is empty; make one with paceline bench")
    header = _parsed(lines[0])
    if header is None or header.get("kind") != "paceline-bench" or "methods" not in header:
        raise ValueError(f"{path} does not begin with the header of a run file; make one with paceline bench")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path} is a run file of version {header.get('version')} and this is for version {VERSION}; run the bench "
            "again"
        )
    left_out: Counter[str] = Counter()
    records: dict[tuple, Record] = {}
    ends: dict[tuple, int] = {}  # where the last line of a batch ends
    offset, foreign = len(lines[0]), False
    for line in lines[1:]:
        offset += len(line)
        entry = _parsed(line) if line.endswith(b"\n") else None
        reason = "cut or damaged"
        if entry is not None and "kind" in entry:
            foreign, reason = entry != header, "further headers"
        elif entry is not None and foreign:
            reason = "of another run or version"
        elif entry is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
                record = Record.parse(entry)
                if record.key not in records:
                    ends[record.group], records[record.key] = offset, record
                    continue
                reason = "written twice"
        left_out[reason] += 1
    seen = Counter(record.group for record in records.values())
    whole = [record for record in records.values() if seen[record.group] == record.rows]
    if len(whole) < len(records):
        left_out["of incomplete batches"] += len(records) - len(whole)
    end = max((ends[record.group] for record in whole), default=len(lines[0]))
    return Run(str(path), header, whole, dict(left_out)), end


def _parsed(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


class RunWriter:
    """Appends to a run file that no other bench writes; what an interruption cut off at its end is cut.

    `done` are the records that are there already. A file without any begins anew, with the first of them. Raises
    ValueError where the file is of another setup, naming the difference, cannot be written, or is being written by
    another process."""

    def __init__(self, path: str | Path, header: dict):
        self.path, self.head = Path(path), json.dumps(header) + "\n"
        try:
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  (held open while measuring)
        except OSError as error:
            raise ValueError(f"run file {path} cannot be written ({error.strerror}); choose another place") from error
        try:
            _lock(self.file, path)
        except BaseException:
            self.file.close()
            raise
        try:
            self.done = self._begun(header)
            self.begun = bool(self.done)
        except BaseException:
            self.close()
            raise

    def _begun(self, header: dict) -> list[Record]:
        """The records that are there, of which nothing incomplete stays."""
        self.file.seek(0)
        start = self.file.read()
        if b"\n" not in start:
            if not self.head.encode().startswith(start[:20]):
                raise ValueError(f"{self.path} is no run file; choose another place, nothing was overwritten")
            return []
        run, end = _read(self.path)
        if run.records:
            for name in ("setup", "methods"):
                check_equal(self.path, name, run.header[name], header[name])
            self.file.truncate(end)
        return run.records

    def append(self, records: list[Record]) -> None:
        """Write the lines of a batch with one call."""
        if not self.begun:
            self.file.truncate(0)
        self._write(("" if self.begun else self.head) + "".join(record.line() for record in records))
        self.begun = True

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        while data:
            data = data[self.file.write(data) :]

    def close(self) -> None:
        """Close the file; an empty one goes."""
        if not os.fstat(self.file.fileno()).st_size:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.file.close()


def check_equal(path: str | Path, name: str, recorded, asked) -> None:
    """Raise ValueError that names the first setting in which a run file differs from what is asked for now."""
    if recorded == asked:
        return
    if name == "methods":
        recorded, asked = ({method["name"]: method for method in methods} for methods in (recorded, asked))
        if list(recorded) == list(asked):
            for method in asked:
                check_equal(path, f"method {method}", recorded[method], asked[method])
            return
        recorded, asked = ", ".join(recorded), ", ".join(asked)
    if isinstance(recorded, dict) and isinstance(asked, dict):
        within = f"{name}: " if name.startswith("method ") else ""
        for key in [*recorded, *asked]:  # one that is absent is of a file that an earlier version began
            check_equal(path, f"{within}{key}", recorded.get(key), asked.get(key))
        return
    raise ValueError(
        f"{path} was begun with {name} = {_short(recorded)} and now {name} = {_short(asked)}; ask for the same, or "
        "write to another file"
    )


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _lock(file: io.FileIO, path: str | Path) -> None:
    """Raise ValueError where another process has the file, or has put another one in its place."""
    try:
        alone = lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        alone = False
    if not alone:
        raise ValueError(f"{path} is being written by another bench; wait for it, or write to another file")
