"""What a report opens with: a sentence that claims no more than its interval, and bars as long as the figures."""

import json
import random
import re
from dataclasses import replace

import pytest
from paceline.spec.bench import wording
from paceline.spec.bench.analysis import analyse
from paceline.spec.bench.report import page
from paceline.spec.bench.runfile import read_run

from support import runs


def measured(tmp_path, others=(), made=None, **changes):
    """(figures, page) of plain decoding, ngram and `others`: (name, kind, factor on the seconds of plain decoding)."""
    head, made = runs.header(**changes), list(made or runs.records(24))
    plain = [record for record in made if record.method == "ar"]
    for name, kind, factor in others:
        head["methods"].append({**head["methods"][1], "name": name, "kind": kind})
        made += [replace(record, method=name, seconds=record.seconds * factor()) for record in plain]
    run = read_run(runs.write(tmp_path / "r.jsonl", head, made))
    figures = analyse([run])
    return figures, page(figures, [run])


def by(factor):
    return lambda: factor


def about_one():
    rng = random.Random(3)
    return lambda: rng.uniform(0.7, 1.3)


def drawn(text):
    """{method: (bar, the line at 1, ends of the whisker)} in units of the gain, the line at 1 being 1."""
    found = {}
    for name, svg in re.findall(r'<svg role="img" aria-label="Speed-up of ([^"]*): [^"]*">(.*?)</svg>', text, re.S):
        (line,) = re.findall(r'class="one" x1="([\d.]+)%" x2="\1%"', svg)
        (bar,) = re.findall(r'<rect class="gained \w+" x="0" y="8" width="([\d.]+)%"', svg)
        ends = re.findall(r'class="whisker" x1="([\d.]+)%" x2="([\d.]+)%" y1="18" y2="18"', svg)
        found[name] = float(bar) / float(line), [float(end) / float(line) for pair in ends for end in pair]
    return found


def test_bars_and_whiskers_are_the_figures(tmp_path):
    others = [("slow", "drafted", by(1.5)), ("even", "drafted", about_one()), ("transformers", "transformers", by(1.8))]
    figures, text = measured(tmp_path, others)
    bars = drawn(text)
    gains = {own["label"]: own["speedup"] for own in figures["methods"] if own["speedup"]}
    assert list(bars) == sorted(gains, key=lambda name: -gains[name]["value"]) and len(bars) == 4
    for name, (bar, ends) in bars.items():
        assert bar == pytest.approx(gains[name]["value"], abs=0.001)
        assert ends == pytest.approx([gains[name]["low"], gains[name]["high"]], abs=0.001)
    assert bars["slow"][0] == pytest.approx(1 / 1.5, abs=0.001), "a slower method ends before the line"
    assert bars["transformers"][0] == pytest.approx(1 / 1.8, abs=0.001)
    words = dict(re.findall(r'<div class="gain"><p>(\w+) <strong>.*?</strong> ([\w ]+)</p>', text))
    assert words == {"ngram": "faster", "even": wording.NOISE, "slow": "slower", "transformers": "slower"}
    assert "plain decoding (ar): the same model run the same way, without speculation" in text
    assert "The other baseline is transformers&#39; generate() of the same model (transformers)" in text


def test_the_verdict_names_the_number_its_baseline_and_the_machine(tmp_path):
    figures, text = measured(tmp_path, [("transformers", "transformers", by(1.8))])
    gain = figures["methods"][1]["speedup"]
    said = f"{gain['value']:.2f} times plain decoding [{gain['low']:.2f}, {gain['high']:.2f}] with ngram: 24 prompts"
    assert wording.verdict(figures) == f"{said}, tiny in float32 on a CPU, 1 thread"
    assert text.index(said) < text.index('<h2 id="gains">') < text.index("drafted and accepted") < text.index("<table")
    over = figures["methods"][1]["over_transformers"]
    assert over["value"] == pytest.approx(1.8 * gain["value"])
    assert f"24/24 texts · greedy · {over['value']:.2f} times transformers' generate() [" in wording.particulars(
        figures
    )
    figures, _ = measured(tmp_path, [("other", "drafted", by(0.9))], threads=4, batch=2)
    assert wording.verdict(figures).endswith(
        " with ngram (of 2 measured): 24 prompts in batches of 2, tiny in float32 on a CPU, 4 threads"
    )
    figures["setup"]["device"], figures["runs"][0]["machine"]["gpu"] = "cuda", "a GPU"
    assert wording.verdict(figures).endswith(" on a GPU")


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ((1.5, 1.4, 1.6), "1.50 times it [1.40, 1.60]"),
        ((1.5, 0.9, 2.1), "no difference beyond noise: 1.50 times it [0.90, 2.10]"),
        ((1.1, 1.004, 1.2), "no difference beyond noise: 1.10 times it [1.00, 1.20]"),
        ((0.9, 0.8, 0.996), "no difference beyond noise: 0.90 times it [0.80, 1.00]"),
        ((0.8, 0.7, 0.9), "0.80 times it [0.70, 0.90] (slower)"),
        ((1.5, None, None), "1.50 times it (no interval)"),
    ],
)
def test_no_more_is_said_than_the_interval_allows(gain, said):
    assert wording.times(dict(zip(("value", "low", "high"), gain)), "it") == said


def test_a_gain_within_noise_is_told_as_none(tmp_path):
    rng, made = random.Random(5), runs.records(12)
    plain = {record.prompt: record.seconds for record in made if record.method == "ar"}
    made = [r if r.method == "ar" else replace(r, seconds=plain[r.prompt] * rng.uniform(0.6, 1.4)) for r in made]
    figures, text = measured(tmp_path, made=made)
    gain = figures["methods"][1]["speedup"]
    assert gain["low"] < 1 < gain["high"]
    assert wording.verdict(figures).startswith(
        f"No difference beyond noise: {gain['value']:.2f} times plain decoding ["
    )
    ((_, (low, high)),) = drawn(text).values()
    assert low < 1 < high


def test_the_best_is_what_is_surest(tmp_path):
    rng = random.Random(2)
    made = [record for record in runs.records(8) if record.method == "ar"]
    wild = [("wild", "drafted", lambda: rng.choice([0.05, 0.8])), ("steady", "drafted", by(0.6))]
    figures, _ = measured(tmp_path, wild, made=made)
    gains = {own["label"]: own["speedup"] for own in figures["methods"]}
    assert gains["wild"]["value"] > gains["steady"]["value"] and gains["wild"]["low"] < gains["steady"]["low"]
    assert figures["best"] == "steady"


def test_one_prompt_has_a_bar_and_no_whisker(tmp_path):
    figures, text = measured(tmp_path, made=runs.records(1))
    gain = figures["methods"][1]["speedup"]["value"]
    assert drawn(text)["ngram"] == (pytest.approx(gain, abs=0.001), []) and 'class="whisker"' not in text
    assert "plain decoding (no interval) with ngram: 1 prompt, tiny" in wording.verdict(figures)


def test_baselines_that_are_missing_are_said_to_be(tmp_path):
    figures, text = measured(tmp_path)
    assert "Transformers&#39; generate() was not measured beside it." in text
    drafted = [record for record in runs.records(4) if record.method == "ngram"]
    figures, text = measured(tmp_path, made=drafted)
    assert wording.verdict(figures) == "No method with a drafter was measured against plain decoding."
    assert drawn(text) == {} and "1 = plain decoding" not in text
    assert "No plain decoding was measured beside ngram, so no speed-up is known." in text


def test_a_wide_interval_does_not_press_the_bars_together(tmp_path):
    made = runs.records(2)
    for record in made:
        record.seconds *= 9.0 if record.prompt == "p1" and record.method == "ar" else 1.0
    figures, text = measured(tmp_path, made=made)
    gain = figures["methods"][1]["speedup"]
    assert gain["high"] > 2.1 * gain["value"]
    assert float(re.search(r'<rect class="gained drafted" x="0" y="8" width="([\d.]+)%"', text)[1]) > 45


def test_long_and_hostile_names_are_whole_and_only_text(tmp_path):
    long, evil = "ngram:tree=" + "4x2x1+" * 12 + "chain:5", '"><script>alert(1)</script>\u202e'
    figures, text = measured(tmp_path, [(long, "drafted", by(0.01)), (evil, "drafted", by(1.2))])
    assert f'<div class="gain"><p>{long} <strong>' in text and f"with {long} (of 3 measured)" in text
    assert "<script" not in text and "\u202e" not in text and "⟨U+202E⟩" in text
    assert json.loads(json.dumps(figures))["best"] == long
