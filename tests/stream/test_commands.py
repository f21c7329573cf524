"""`paceline plan`, `profile` and `bench` on a target that is streamed from the disk: curves, texts, replay, decoding
with the plan, and what a run file keeps."""

import json

import pytest
from paceline.spec import cli
from paceline.spec.bench.runfile import read_run
from paceline.spec.kernels import native
from paceline.spec.plan import streamed as timing
from paceline.spec.plan.trees import Plan
from paceline.spec.tree import DynamicShape

from support.models import noisy_copy, tiny_llama


@pytest.fixture
def pair(tmp_path, monkeypatch, tokenizer, one_thread):
    """Options that name a target of four layers, all of which are streamed with 100 kB, and a draft; and prompts."""
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(max_position_embeddings=2048, num_hidden_layers=4)
    for name, weights in (("target", model), ("draft", noisy_copy(model))):
        weights.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ABCABC"}\n{"prompt": "XYZ"}\n')
    return ["--model", str(tmp_path / "target"), "--drafter", str(tmp_path / "draft")], tmp_path / "prompts.jsonl"


@pytest.mark.slow
def test_a_streamed_target_is_planned_and_decoded_by_the_plan(pair, tmp_path, capsys, monkeypatch):
    names, prompts = pair
    streamed = [*names, "--stream", "disk", "--resident", "100kB"]
    calibrate = ["--calibrate", str(prompts), "--max-new-tokens", "8"]
    assert cli.main(["plan", *streamed, *calibrate, "-o", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr()
    assert "layers streamed from disk" in shown.out and "steps timed" in shown.out
    assert "draft, trees of width 8" in shown.out
    table = shown.out[shown.out.index("nodes  depth  width  tokens per step") :].splitlines()
    assert [line.split()[0] for line in table[2:21]] == [str(n) for n in (
        4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512
    )]  # fmt: skip
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.plain_seconds > 0 and (isinstance(plan.shape, DynamicShape) or plan.speedup == 1)
    (curve,) = (tmp_path / "cache" / "curves").iterdir()
    written = curve.read_text()
    texts = []
    for options in ([*streamed, "--tree", "auto"], [*streamed, "--tree", "dynamic:40x6x4"], names):
        assert cli.main(["generate", *options, "--prompt", "ABC", "--max-new-tokens", "12", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        texts.append(said["tokens"])
        assert (said["weights_bytes"] or 0) > 0 or options is names
    assert texts[0] == texts[1] == texts[2], "the text of the target in memory"
    assert cli.main(["plan", *streamed, *calibrate, "--drafter", "ngram"]) == 0
    assert "p: depth" in capsys.readouterr().out and curve.read_text() == written, "steps are not timed again"
    assert cli.main(["generate", *streamed[:-1], "140kB", "--prompt", "ABC", "--tree", "auto"]) == 2
    assert "make one with paceline plan" in capsys.readouterr().err, "a plan is for the layers that are resident"
    assert cli.main(["plan", *streamed, *calibrate, "--executor", "compiled"]) == 2
    assert "use 'eager'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bench_of_a_streamed_target_keeps_what_was_fetched(pair, tmp_path, capsys):
    names, prompts = pair
    out, length = tmp_path / "run.jsonl", ["--max-new-tokens", "8"]
    methods = ["--methods", "ngram", f"{names[3]}:tree=dynamic:12x4x2,name=draft"]
    command = ["bench", str(prompts), "-o", str(out), *names[:2], *length, *methods]
    assert cli.main([*command, "--stream", "disk", "--resident", "100kB"]) == 0
    run = read_run(out)
    setup = run.header["setup"]
    assert (setup["stream_kind"], setup["stream_layers"], setup["stream_resident_layers"]) == ("disk", 4, 0)
    each = setup["stream_bytes_per_forward"]
    assert {record.method for record in run.records} == {"ar", "ngram", "draft", "transformers"}
    assert all(record.identical in (None, True) for record in run.records)
    for record in run.records:
        assert bool(record.events) == (record.method != "transformers")
        assert all(event.fetched is not None and "wait" in event.seconds for event in record.events)
    plain = [event for record in run.of("ar") for event in record.events]
    assert sum(event.fetched.bytes for event in plain) == pytest.approx(each * len(plain), rel=0.2)
    assert "streamed from disk" in capsys.readouterr().out
    assert cli.main([*command, "--stream", "disk", "--resident", "140kB"]) == 2, "a run is of one way to stream"
    assert f"{out} was begun with stream_resident_layers = 0 and now" in capsys.readouterr().err


@pytest.mark.slow
def test_a_profile_of_a_streamed_target_times_its_steps_anew(pair, tmp_path, capsys, monkeypatch):
    names, _ = pair
    monkeypatch.setattr(timing, "SIZES", (1, 8))
    command = ["profile", *names[:2], "--drafter", "ngram", "--stream", "disk", "--resident", "100kB"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 layers streamed from disk" in shown and "steps timed" in shown
    assert "an eager step of" in shown and "\nwait " in shown, "a step's phases, and what it waits"
    (curve,) = (tmp_path / "cache" / "curves").iterdir()
    kept = json.loads(curve.read_text())
    assert [*kept["seconds"]] == ["1", "8"]
    curve.write_text(json.dumps({**kept, "measured": "long ago"}))
    assert cli.main(command) == 0
    assert "long ago" not in curve.read_text() + capsys.readouterr().out


@pytest.mark.parametrize("options, sentence", [
    (["--stream", "tape"], "stream='tape' is no place to stream from; use 'disk', or on CUDA 'host'"),
    (["--resident", "4GB"], "resident='4GB' is for a model that is streamed; pass stream= as well, or leave it out"),
    (["--stream", "disk", "--resident", "much"], "resident='much' is no size of memory; write it like '8GB'"),
    (["--stream", "disk", "--resident", "1kB"], "is too little"),
    (["--stream", "host"], "stream='host' is for a GPU"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_refused_in_a_sentence(pair, capsys, options, sentence):
    names, _ = pair
    assert cli.main(["generate", *names, *options, "--device", "cpu", "--prompt", "ABC"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("paceline: ") and sentence in said
