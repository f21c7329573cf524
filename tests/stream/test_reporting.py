"""What a streamed target costs, from the step to the page: waits, bytes, and how much of them was hidden."""

import json
from dataclasses import replace

import paceline
import pytest
import torch
from paceline.spec import cli
from paceline.spec.bench.runfile import Record
from paceline.spec.rows import Stopwatch
from paceline.spec.stream.record import StreamRecord
from paceline.spec.trace import Event, Fetched, Trace
from stream.pretending import ABOUT, pretending

from support import runs
from support.models import tiny_llama

STREAM = {f"stream_{name}": getattr(ABOUT, name) for name in ("kind", "layers", "resident_layers", "bytes_per_forward")}


class Told:
    """A streamer that says what it is told to."""

    record = StreamRecord()


def test_waits_are_taken_out_of_the_phase_in_which_they_fell():
    told = Told()
    watch = Stopwatch(torch.device("cpu"), told)
    for phase, record in (
        ("draft", StreamRecord(0, 0.0, 0.5, 50)),
        ("verify", StreamRecord(1, 0.25, 1.0, 100)),
        ("commit", StreamRecord(1, 0.25, 1.25, 125)),
    ):
        told.record = record
        watch.mark(phase)
    watch.times = [0.0, 0.125, 1.125, 1.25]
    assert watch.seconds() == {"draft": 0.125, "verify": 0.75, "commit": 0.125, "wait": 0.25}
    assert watch.fetched() == Fetched(125, 1.25)
    assert Stopwatch(torch.device("cpu")).fetched() is None


class QueuedEvent:
    """An event of a device that does what it is given when somebody waits for it: two seconds between any two, of which
    half a one in each step is a wait, and one and a half copy a gigabyte."""

    made, told = [], Told()

    def __init__(self, enable_timing):
        self.number = len(self.made)
        self.made.append(self)

    def record(self, stream):
        pass

    def synchronize(self):
        steps = self.number // 4 + 1
        self.told.record = StreamRecord(steps, 0.5 * steps, 1.5 * steps, self.told.record.bytes_read)

    def elapsed_time(self, other):
        return 2000.0 * (other.number - self.number)


def test_a_device_that_works_behind_the_host_counts_for_the_step_that_it_was_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", QueuedEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    told = QueuedEvent.told
    for _ in range(3):
        watch = Stopwatch(torch.device("cuda"), told)
        told.record = replace(told.record, bytes_read=told.record.bytes_read + 10**9)  # is queued
        for phase in ("draft", "verify", "commit"):
            watch.mark(phase)
        assert watch.seconds() == {"draft": 2.0, "verify": 1.5, "commit": 2.0, "wait": 0.5} == watch.seconds()
        assert watch.fetched() == Fetched(10**9, 1.5)


def test_what_is_hidden_is_counted_by_hand():
    """Two steps of two rows: 3 s of fetching and 2 s of working took 4 s, so that half of the working was hidden."""
    phases = {"draft": 0.25, "verify": 0.75, "wait": 1.0}
    events = [Event(row, step, [5], [-1], [], 7, phases, "", Fetched(600, 1.5)) for step in (0, 1) for row in (0, 1)]
    summary = Trace(events).summary()
    assert summary["seconds"] == {"draft": 0.5, "verify": 1.5, "wait": 2.0}
    assert (summary["weights_bytes"], summary["weights_seconds"], summary["weights_bandwidth"]) == (1200, 3.0, 400.0)
    assert summary["weights_hidden"] == pytest.approx((3.0 - 2.0) / 2.0)
    whole = [Event(0, 0, [5], [-1], [], 7, {"verify": 4.0, "wait": 0.0}, "", Fetched(600, 3.0))]
    assert Trace(whole).summary()["weights_hidden"] == 1.0, "all of the fetching was"
    turns = [Event(0, 0, [5], [-1], [], 7, {"verify": 4.0, "wait": 3.0}, "", Fetched(600, 3.0))]
    assert Trace(turns).summary()["weights_hidden"] == 0.0, "one waited for the other"
    said = Trace(events).prometheus()
    assert "# TYPE paceline_weights_bytes counter\npaceline_weights_bytes 1200\n" in said
    assert "paceline_weights_bandwidth 400.0" in said and 'paceline_seconds{phase="wait"} 2.0' in said
    assert "weights" not in Trace([Event(0, 0, [5], [-1], [], 7)]).prometheus()


def test_events_carry_the_wait_and_the_bytes(tmp_path):
    model, ids, file = tiny_llama(), torch.tensor([[5, 6, 7]]), tmp_path / "trace.jsonl"
    plain = paceline.generate(model, ids, drafter="ngram", max_new_tokens=6, trace_file=file)
    with pretending(model) as made:
        out = paceline.generate(
            model, ids, drafter="ngram", max_new_tokens=6, return_dict_in_generate=True, trace_file=file
        )
    assert torch.equal(out.sequences, plain)
    steps = out.trace.events
    assert made.forwards >= len(steps) and all(event.fetched == Fetched(3_000_000, 0.5) for event in steps)
    assert all(event.seconds["wait"] == pytest.approx(1e-6) for event in steps)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert "fetched" not in lines[0], "a target in memory fetches nothing"
    assert lines[-1]["fetched"] == {"bytes": 3_000_000, "seconds": 0.5}


def streamed_run(path):
    """A run file in which plain decoding waited for all of its fetching, and drafts hid half of their own."""
    lines = runs.records(24)
    for record in lines:
        for event in record.events:
            spent = sum(event.seconds.values())
            event.seconds["wait"] = spent if record.method == "ar" else spent / 2
            event.fetched = Fetched(3_000_000, spent)
    return runs.write(path, runs.header(**STREAM, stream_direct=True), lines)


def test_run_files_keep_what_was_fetched():
    record = runs.records(1)[0]
    assert Record.parse(json.loads(record.line())).events[0].fetched is None
    for number, event in enumerate(record.events):
        event.fetched = Fetched(1000 + number, 0.25)
    again = Record.parse(json.loads(record.line()))
    assert [event.fetched for event in again.events] == [event.fetched for event in record.events]


def test_the_report_says_what_was_waited_fetched_and_hidden(tmp_path, capsys):
    path = streamed_run(tmp_path / "r.jsonl")
    assert cli.main(["report", str(path), "--markdown", "-", "-o", str(tmp_path / "r.html")]) == 0
    shown = capsys.readouterr().out
    assert "0.00 GB a forward streamed from disk past the page cache, 1 of 4 layers resident" in shown
    header = "| method | waited, s | of the steps' time | fetched, GB | GB/s | hidden |"
    table = shown[shown.index(header) :].splitlines()
    assert table[2].startswith("| ar |") and table[2].split(" | ")[2] == "50%" and table[2].endswith("| 0% |")
    assert table[3].startswith("| ngram |") and table[3].split(" | ")[2] == "33%" and table[3].endswith("| 50% |")
    page = (tmp_path / "r.html").read_text()
    assert "Weights fetched while steps went on" in page and "<dt>hidden</dt>" in page
    plain = runs.write(tmp_path / "plain.jsonl")
    assert cli.main(["report", str(plain), "--markdown", "-", "-o", str(tmp_path / "plain.html")]) == 0
    assert "waited" not in capsys.readouterr().out
    assert "Weights fetched" not in (tmp_path / "plain.html").read_text()
