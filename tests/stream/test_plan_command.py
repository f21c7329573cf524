"""`paceline plan` on a target that is streamed from the disk: curves, texts, replay, and decoding with the plan."""

import json

import pytest
from paceline.spec import cli
from paceline.spec.kernels import native
from paceline.spec.plan.trees import Plan
from paceline.spec.tree import DynamicShape

from support.models import noisy_copy, tiny_llama


@pytest.fixture
def pair(tmp_path, monkeypatch, tokenizer, one_thread):
    """Options that name a target of four layers, of which two are streamed, and a draft model; and prompts."""
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
