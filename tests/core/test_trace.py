"""The trace: events that add up to the text, and a summary against figures worked out by hand."""

import itertools
import json

import paceline
import pytest
from paceline.spec.trace import Event, Trace


def by_hand():
    """Two rows of a tree 0 -> 1, 2; 1 -> 3, and one chain step with an empty node."""
    return Trace(
        [
            Event(0, 0, [9, 4, 5, 6], [-1, 0, 0, 1], [1, 3], 7, {"draft": 0.5, "verify": 1.0}),
            Event(1, 0, [9, 4, 5, 6], [-1, 0, 0, 1], [2], 8, {"draft": 0.5, "verify": 1.0}),
            Event(0, 1, [7, 4, -1, -1], [-1, 0, 0, 1], [], 2, {"draft": 0.25, "verify": 2.0}),
            Event(1, 1, [8, 3, 5, 2], [-1, 0, 0, 1], [1, 3], None, {"draft": 0.25, "verify": 2.0}),
        ]
    )


def test_summary_equals_the_figures_worked_out_by_hand():
    assert by_hand().summary() == {
        "mean_acceptance_length": 1 + 5 / 4,
        "draft_acceptance_rate": 5 / 10,
        "examined_acceptance_rate": 5 / 9,
        "acceptance_histogram": [1, 1, 2],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 5,
        "num_draft_tokens": 10,
        "num_examined_draft_tokens": 9,
        "num_tokens": 8,
        "tokens_per_step": 2.0,
        "tokens_per_step_histogram": [0, 1, 2, 1],
        "survival": [3 / 4, 2 / 4],
        "conditional": [3 / 4, 1.0],
        "seconds": {"draft": 0.75, "verify": 3.0},
        **dict.fromkeys(("weights_bytes", "weights_seconds", "weights_bandwidth", "weights_hidden")),
    }


def test_an_empty_trace_has_no_rates():
    summary = Trace().summary()
    assert summary["mean_acceptance_length"] is None and summary["draft_acceptance_rate"] is None
    assert summary["num_spec_steps"] == 0


def test_cutting_a_row_cuts_its_events_and_no_others():
    trace = by_hand()
    trace.cut(0, 2)
    first, *rest = [event for event in trace.events if event.row == 0]
    assert rest == [] and first.committed == [4, 6] and first.bonus is None
    assert [event.committed for event in trace.events if event.row == 1] == [[5, 8], [3, 2]]


def test_events_add_up_to_the_text(target, draft, ragged, tmp_path):
    ids, mask = ragged
    file = tmp_path / "trace.jsonl"
    for drafter in (None, "ngram", draft):
        out = paceline.generate(
            target, ids, mask, drafter=drafter, max_new_tokens=24, do_sample=False, eos_token_id=[17, 30],
            pad_token_id=0, return_dict_in_generate=True, trace_file=file,
        )  # fmt: skip
        summary = out.trace.summary()
        texts = {row: [token for event in events for token in event.committed] for row, events in out.trace.rows()}
        for row, text in texts.items():
            generated = out.sequences[row, 9:].tolist()
            ends = [i for i, token in enumerate(generated) if token in (17, 30)]
            assert text == generated[: ends[0] + 1 if ends else None]
        histogram = summary["acceptance_histogram"]
        assert sum(histogram) == summary["num_spec_steps"]
        assert sum(i * count for i, count in enumerate(histogram)) == summary["num_accepted_draft_tokens"]
        assert summary["num_tokens"] == sum(map(len, texts.values()))
        ended_early = sum(event.bonus is None for event in out.trace.events)
        assert summary["num_tokens"] == summary["num_accepted_draft_tokens"] + summary["num_spec_steps"] - ended_early
        for event in out.trace.events:
            path = [0, *event.accepted]
            assert all(event.parents[child] == parent for parent, child in itertools.pairwise(path))
            assert set(event.seconds) == {"draft", "verify", "commit"} and min(event.seconds.values()) >= 0
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        mine = [line for line in lines if line["run"] == out.trace.run]
        assert len(mine) == summary["num_spec_steps"] and mine[-1]["tokens"] == out.trace.events[-1].tokens
    assert len({line["run"] for line in lines}) == 3


def test_the_trace_file_survives_an_interruption(target, ragged, tmp_path):
    def stop(events):
        if events[0].step == 2:
            raise KeyboardInterrupt

    file = tmp_path / "trace.jsonl"
    with pytest.raises(KeyboardInterrupt):
        paceline.generate(target, *ragged, max_new_tokens=20, trace_file=file, on_step=stop)
    assert {json.loads(line)["step"] for line in file.read_text().splitlines()} == {0, 1, 2}
