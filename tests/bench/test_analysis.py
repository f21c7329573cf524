"""Figures of run files made by hand against the same figures worked out otherwise."""

import pytest
from paceline.spec.bench.analysis import analyse, percentiles
from paceline.spec.bench.runfile import read_run

from support import runs


@pytest.fixture
def run(tmp_path):
    return read_run(runs.write(tmp_path / "r.jsonl", lines=runs.records(10, repeats=2)))


def test_rates_and_gains_are_ratios_of_sums(run):
    plain, drafted = analyse([run])["methods"]
    seconds = {name: sum(r.seconds for r in run.of(name)) for name in ("ar", "ngram")}
    tokens = sum(len(r.tokens) for r in run.of("ar"))
    gain = drafted["speedup"]
    assert gain["value"] == pytest.approx(seconds["ar"] / seconds["ngram"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert plain["rate"] == pytest.approx(tokens / seconds["ar"]) and plain["speedup"] is None
    steps = sum(len(r.events) for r in run.of("ngram"))
    assert drafted["tokens_per_step"]["value"] == pytest.approx(tokens / steps)
    assert plain["tokens_per_step"]["value"] == pytest.approx(1)
    assert drafted["identical"] == drafted["compared"] == 20
    for figures in drafted["categories"]:
        own = [r for r in run.of("ngram") if r.category == figures["name"]]
        assert figures["rate"] == pytest.approx(sum(len(r.tokens) for r in own) / sum(r.seconds for r in own))
    assert drafted["macro"]["rate"] == pytest.approx(sum(c["rate"] for c in drafted["categories"]) / 2)
    assert sum(c["accepted"] for c in drafted["categories"]) == drafted["overall"]["accepted"]


def test_time_adds_up_and_the_prediction_is_near_where_steps_are_all_there_is(run):
    _, drafted = analyse([run])["methods"]
    assert sum(drafted["split"].values()) == pytest.approx(sum(r.seconds for r in run.of("ngram")))
    own = drafted["predicted"]
    assert own["step_cost"] == pytest.approx(1, rel=1e-3)
    assert own["speedup"] == pytest.approx(drafted["tokens_per_step"]["value"], rel=1e-3)
    assert own["speedup"] > drafted["speedup"]["value"], "prompts take time too"
    assert own["planned_tokens_per_step"] == pytest.approx(drafted["tokens_per_step"]["value"], rel=0.1)


def test_the_gain_in_steps_alone_leaves_the_prompt_out(run):
    """Also of batches, here of two prompts each, whose rows share their steps."""
    plain, drafted = analyse([run])["methods"]
    time = {name: sum(sum(e.seconds.values()) for r in run.of(name) for e in r.events) for name in ("ar", "ngram")}
    gain = drafted["overall"]["speedup_of_steps"]
    assert gain["value"] == pytest.approx(time["ar"] / time["ngram"]) and gain["low"] < gain["value"] < gain["high"]
    assert gain["value"] > drafted["speedup"]["value"] and plain["overall"]["speedup_of_steps"] is None
    time = {"ar": 0.0, "ngram": 0.0}
    for record in run.records:
        record.batch //= 2
        for event in record.events:
            event.group = f"{record.method} {record.batch} {record.repeat}"
    for name in time:
        shared = {(e.group, e.step): e.seconds for r in run.of(name) for e in r.events}
        time[name] = sum(sum(seconds.values()) for seconds in shared.values())
    _, drafted = analyse([run])["methods"]
    assert drafted["overall"]["speedup_of_steps"]["value"] == pytest.approx(time["ar"] / time["ngram"])


def test_unequal_set_ups_are_refused_with_the_difference(tmp_path, run):
    for changes, words in (({"dtype": "bfloat16"}, "dtype = 'float32'"), ({"threads": 2}, "threads = 1")):
        other = read_run(runs.write(tmp_path / "o.jsonl", runs.header(**changes)))
        with pytest.raises(ValueError, match=words):
            analyse([run, other])
    head = runs.header()
    head["machine"]["cpu"] = "another"
    with pytest.raises(ValueError, match="machine cpu = 'a CPU'"):
        analyse([run, read_run(runs.write(tmp_path / "o.jsonl", head))])


def test_percentiles_of_a_histogram_are_those_of_its_numbers():
    numbers = sorted([0] * 2 + [1] * 10 + [2] * 5 + [5] * 3)
    assert percentiles([2, 10, 5, 0, 0, 3]) == [numbers[1], numbers[9], numbers[17]]
    assert percentiles([0]) == [0, 0, 0]
