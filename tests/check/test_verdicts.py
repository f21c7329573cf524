"""Verdicts: kept for the executor that is chosen, and compared side by side."""

import json

import pytest
import torch
from paceline.spec import cli
from paceline.spec.check import verdict
from paceline.spec.check.record import FAILS, HOLDS, NOT_HERE, Check, Finding, Part
from paceline.spec.engines import capture_choice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("texts", "seconds", "kept"),
    [
        ([HOLDS] * 6 + [NOT_HERE], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, True),
        ([HOLDS] * 6, {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 3.1)}, False),
        ([HOLDS] * 6 + [FAILS], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, False),
        ([HOLDS] * 5 + [NOT_HERE], {1: (2.0, 1.0), 4: (2.0, 1.0), 8: (3.0, 2.0)}, None),
        ([HOLDS] * 6, {1: (2.0, 1.0), 4: (2.0, 1.0)}, None),
        ([HOLDS] * 6, {}, None),
    ],
)
def test_the_better_capture_is_kept_where_both_were_seen(monkeypatch, texts, seconds, kept):
    verdicts = []
    monkeypatch.setattr(verdict, "keep_verdict", lambda device, better: verdicts.append(better))
    lossless = Part("lossless", "Lossless", True, [Finding({"executor": "cuda_graph_compiled"}, own) for own in texts])
    timed = Part("steps", "Steps", False, [
        Finding({"executor": name, "rows": 1, "nodes": nodes}, figures={"step_seconds": pair[which]})
        for nodes, pair in seconds.items() for which, name in enumerate(("cuda_graph_eager", "cuda_graph_compiled"))
    ])  # fmt: skip
    verdict.keep_better_capture(torch.device("cpu"), Check({}, [lossless, timed]))
    assert verdicts == ([] if kept is None else [kept])


def test_a_verdict_that_cannot_be_kept_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "captures").write_text("a file where a folder should be")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    with pytest.raises(ValueError, match="cannot be written"):
        capture_choice.keep_verdict(torch.device("cuda"), True)


def check_file(path, seconds=0.02, verdict=HOLDS):
    about = {
        "subject": {"name": "tiny", "dtype": "float32", "device": "cpu"}, "machine": {"cpu": "a CPU", "gpu": None},
        "created": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    texts = Finding({"promise": "same text", "executor": "eager"}, verdict, figures={"parted": 0})
    timed = Finding({"executor": "eager", "rows": 1, "nodes": 8}, figures={"step_seconds": seconds, "parents": [-1]})
    made = Check(about, [Part("lossless", "Lossless", True, [texts]), Part("steps", "Steps", False, [timed])])
    path.write_text(json.dumps(made.as_dict("")))
    return str(path)


def test_two_checks_side_by_side(tmp_path, capsys):
    a, b = check_file(tmp_path / "a.json"), check_file(tmp_path / "b.json", 0.03)
    assert cli.main(["compare", a, b]) == 0
    said = capsys.readouterr().out
    assert "A: tiny, float32, a CPU" in said
    (line,) = [line for line in said.splitlines() if "step ms" in line]
    assert line.split() == ["steps:", "eager,", "1,", "8", "step", "ms", "20.00", "30.00", "1.50"]
    broken = check_file(tmp_path / "c.json", verdict=FAILS)
    assert cli.main(["compare", a, broken]) == 1 and cli.main(["compare", broken, a]) == 0
    (tmp_path / "run.jsonl").write_text('{"kind": "paceline-bench"}\n{}\n')
    capsys.readouterr()
    assert cli.main(["compare", a, str(tmp_path / "run.jsonl")]) == 2
    assert "no file of paceline check" in capsys.readouterr().err
    (tmp_path / "d.json").write_text('{"kind": "paceline-check", "parts": [{}]}')
    assert cli.main(["compare", a, str(tmp_path / "d.json")]) == 2
    assert "damaged check" in capsys.readouterr().err
