"""The ledger of a generation run: records on disk whether each job is done, failed or skipped.

OUT.jsonl holds the answers, OUT.problems.jsonl the failed and skipped jobs with reasons, OUT.turns.jsonl the user turns
that the target invented, and OUT.run.json the settings, which must be the same when the run is resumed. Failed jobs are
tried again by the next run, skipped ones are not. Nothing is written before there is a result, and a run without one
does not bind the next to its settings. Knows nothing of models and servers.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from ...spec.cli.outputs import companion
from ...spec.console import Bar
from ...spec.files import write_json
from ..records import Journal
from .prompts import Prompt, Unusable


@dataclass(frozen=True, slots=True)
class Job:
    """One answer, or conversation, to make."""

    id: str
    prompt: Prompt
    temperature: float
    seed: int


def job_seed(seed: int, name: str) -> int:
    """A job's seed: a hash of the run's seed and the job's name, independent of the order of jobs."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")


class Ledger:
    """Looks at the files of a run, and makes them with the first result. Raises ValueError where they were made with
    other settings."""

    def __init__(self, out: str | Path, settings: dict, limit_tokens: int | None = None):
        self.run, self.settings, self.begun = companion(out, ".run.json"), settings, False
        names = Path(out), companion(out, ".problems.jsonl"), companion(out, ".turns.jsonl")
        filled = [path for path in names if path.exists() and path.stat().st_size]
        if filled and not self.run.exists():
            said = f"{filled[0]} exists and {self.run.name}, which says how it was made, does not"
            raise ValueError(f"{said}; choose another output")
        self.answers, self.problems, self.turns = map(Journal, names)
        self._check_settings(Path(out))
        self.done = {record.get("id") for record in self.answers.records}
        self.skipped = {record["id"] for record in self.problems.records if record.get("status") == "skipped"}
        self.failed: set[str] = set()
        self.tokens = sum(record.get("tokens", 0) for record in self.answers.records)
        self.limit_tokens = limit_tokens
        self.names: set[str] = set()  # every job that the input asks for
        self.held: list[dict] = []  # problems from before the first result
        self.bar: Bar | None = None
        self.started, self.since = time.perf_counter(), 0
        self.answers.records, self.problems.records = [], []

    def _check_settings(self, out: Path) -> None:
        """Compare the settings with those of the files that are there."""
        if not self.run.exists():
            return
        twin = out.with_name(out.stem if out.suffix == ".jsonl" else f"{out.name}.jsonl")
        if twin.is_file() and not out.exists():
            raise ValueError(f"{self.run} is of {twin.name}; give the output another name than {out.name}")
        try:
            kept = dict(json.loads(self.run.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.run} does not tell how {out} was made ({error}); choose another output") from error
        changed = [name for name in self.settings if kept.get(name) != self.settings[name]]
        if changed and (self.answers.records or self.turns.records):
            was, now = kept.get(changed[0]), self.settings[changed[0]]
            raise ValueError(
                f"{out} was begun with {changed[0]}={was!r} and is now to go on with {now!r}; use the same or another "
                "output file"
            )
        self.begun = not changed
        if changed:
            self.problems.records = []  # of settings that gave no result

    def begin(self) -> None:
        """From now on everything is written."""
        if not self.begun:
            self.run.parent.mkdir(parents=True, exist_ok=True)
            self.problems.clear()
            write_json(self.run, self.settings, sort_keys=True)
            self.begun = True
        for problem in self.held:
            self.problems.add(problem)
        self.held = []

    def open_jobs(self, entries: list[Prompt | Unusable], temperatures: list[float], repeats: int, seed: int):
        """The jobs that are left: every entry at every temperature, sampled ones `repeats` times."""
        variants = [(t, repeat) for t in temperatures for repeat in range(repeats if t > 0 else 1)]
        jobs = []
        for entry in entries:
            for temperature, repeat in variants:
                name = f"{entry.id if isinstance(entry, Prompt) else entry.location}/{temperature:g}/{repeat}"
                self.names.add(name)
                if isinstance(entry, Unusable):
                    self.skip(name, entry.reason)
                elif name not in self.done and name not in self.skipped:
                    jobs.append(Job(name, entry, temperature, job_seed(seed, name)))
        asked = len(self.names)
        self.bar = Bar(total=asked, initial=asked - len(jobs), unit="text", desc="answering")
        self.started = time.perf_counter()
        return jobs

    @property
    def full(self) -> bool:
        """Whether the limit of tokens has been reached."""
        return self.limit_tokens is not None and self.tokens >= self.limit_tokens

    def progress(self, tokens: int) -> None:
        """Add `tokens` to the rate shown by the progress bar."""
        self.since += tokens
        self.bar.set_postfix_str(f"{self.rate:.0f} tokens/s", refresh=False)

    @property
    def rate(self) -> float:
        return self.since / max(time.perf_counter() - self.started, 1e-9)

    def add_turn(self, record: dict) -> None:
        """Keep a user turn that the target invented."""
        self.begin()
        self.turns.add(record)

    def add(self, record: dict) -> None:
        self.begin()
        self.answers.add(record)
        self.done.add(record["id"])
        self.tokens += record["tokens"]
        self._tick()

    def skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.held.append({"id": name, "status": "skipped", "reason": reason})
            self.skipped.add(name)
            self._tick()

    def fail(self, name: str, reason: str) -> None:
        self.begin()
        self.problems.add({"id": name, "status": "failed", "reason": reason})
        self.failed.add(name)
        self._tick()

    def _tick(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def summary(self) -> str:
        """One line: done + failed + skipped (+ left by the limit of tokens) = jobs asked for."""
        done, failed, skipped = (len(self.names & kind) for kind in (self.done, self.failed, self.skipped))
        left = len(self.names) - done - failed - skipped
        assert left == 0 or self.full, "every prompt is accounted for"
        later = f" + {left} left by the limit of tokens" if left else ""
        return (
            f"{done} done + {failed} failed + {skipped} skipped{later} = {len(self.names)} asked for; "
            f"{self.tokens} tokens in the file, {self.rate:.1f} tokens/s in this run"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for journal in (self.answers, self.problems, self.turns):
            journal.close()
