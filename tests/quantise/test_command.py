"""`paceline quantise`, run as a user runs it."""

import json

import pytest
from paceline.spec import cli
from paceline.spec.quantise import command


@pytest.fixture(scope="module")
def base(original, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    original.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path.parent / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word * 2}) + "\n" for word in "ABCDEF"))
    return path


def run(base, output, *options, calibrate=True):
    texts = ["--calibrate", str(base.parent / "prompts.jsonl"), "--texts", "4"] if calibrate else []
    return cli.main(["quantise", str(base), "-o", str(output), "--group", "32", *texts, *options])


def test_a_folder_with_a_table_that_decodes(base, tmp_path, capsys):
    assert run(base, tmp_path / "q4") == 0
    said = capsys.readouterr()
    assert "calibrated" in said.out and "to the nearest codes" in said.out and "quantised in" in said.err
    made = json.loads((tmp_path / "q4" / "quality.json").read_text())
    quality = made["quality"]
    assert quality["16 bits"]["greedy"] == 1 and quality["16 bits"]["kl"] == 0
    assert 0 < quality["calibrated"]["kl"] < quality["to the nearest codes"]["kl"]
    assert made["calibration_texts"] == 4 and quality["calibrated"]["positions"] == 2 * 200
    assert "| calibrated |" in (tmp_path / "q4" / "README.md").read_text()
    texts = []
    for drafter in ("none", "ngram"):
        arguments = ["--model", str(tmp_path / "q4"), "--prompt", "ABCABC", "--max-new-tokens", "16", "--json"]
        assert cli.main(["generate", *arguments, "--drafter", drafter]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_8_bits_are_closer_than_4(base, tmp_path, capsys):
    divergence = {}
    for bits in ("4", "8"):
        assert run(base, tmp_path / bits, "--bits", bits) == 0
        made = json.loads((tmp_path / bits / "quality.json").read_text())
        divergence[bits] = made["quality"]["calibrated"]["kl"]
    assert divergence["8"] < 0.05 * divergence["4"]


def test_refusals_are_one_sentence_and_leave_nothing(base, tmp_path, capsys):
    assert run(base, tmp_path / "q", calibrate=False) == 2
    assert "--calibrate" in (said := capsys.readouterr().err) and said.count("\n") == 1
    (tmp_path / "there").mkdir()
    assert run(base, tmp_path / "there") == 2
    assert "remove it" in capsys.readouterr().err
    assert run(base, tmp_path / "q", "--group", "128") == 2
    assert "--group" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_quantised_model_is_not_quantised_again(folder, base, tmp_path, capsys):
    assert run(folder, tmp_path / "q", "--calibrate", str(base.parent / "prompts.jsonl"), calibrate=False) == 2
    assert "quantised already" in capsys.readouterr().err


def test_an_interrupt_leaves_no_half_folder(base, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_calibrated", interrupted)
    assert run(base, tmp_path / "q") == 130
    assert not list(tmp_path.iterdir())
