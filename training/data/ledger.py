"""The ledger of a generation run: records on disk whether each job is done, failed or skipped.

OUT.jsonl holds the answers, OUT.problems.jsonl the failed and skipped jobs with reasons, and OUT.run.json the settings,
which must be the same when the run is resumed. Failed jobs are tried again by the next run, skipped ones are not. Knows
nothing of models and servers.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

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
    """Creates or resumes the files of a run. Raises ValueError where they were made with other settings."""

    def __init__(self, out: str | Path, settings: dict, limit_tokens: int | None = None):
        out = Path(out)
        self._check_settings(out.with_suffix(".run.json"), out, settings)
        self.answers, self.problems = Journal(out), Journal(out.with_suffix(".problems.jsonl"))
        self.done = {record.get("id") for record in self.answers.records}
        self.skipped = {record["id"] for record in self.problems.records if record.get("status") == "skipped"}
        self.failed: set[str] = set()
        self.tokens = sum(record.get("tokens", 0) for record in self.answers.records)
        self.limit_tokens = limit_tokens
        self.names: set[str] = set()  # every job that the input asks for
        self.bar: tqdm | None = None
        self.started, self.since = time.perf_counter(), 0
        self.answers.records, self.problems.records = [], []

    @staticmethod
    def _check_settings(path: Path, out: Path, settings: dict) -> None:
        if not path.exists():
            if out.exists() and out.stat().st_size:
                raise ValueError(f"{out} exists and {path.name}, which says how it was made, does not; choose another")
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, settings, sort_keys=True)
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name in settings:
            if kept.get(name) != settings[name]:
                raise ValueError(
                    f"{out} was begun with {name}={kept.get(name)!r} and is now to go on with {settings[name]!r}; "
                    "use the same or another output file"
                )

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
        self.bar = tqdm(total=asked, initial=asked - len(jobs), unit="text", desc="answering", disable=None)
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

    def add(self, record: dict) -> None:
        self.answers.add(record)
        self.done.add(record["id"])
        self.tokens += record["tokens"]
        self._tick()

    def skip(self, name: str, reason: str) -> None:
        if name not in self.skipped:
            self.problems.add({"id": name, "status": "skipped", "reason": reason})
            self.skipped.add(name)
            self._tick()

    def fail(self, name: str, reason: str) -> None:
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
        self.answers.close()
        self.problems.close()
