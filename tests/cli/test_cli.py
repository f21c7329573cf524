"""The command line, run as a user runs it, on a tiny model in a folder."""

import io
import json
import signal
import subprocess
import sys
from functools import partial

import pytest
from paceline.spec import cli

from support.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(max_position_embeddings=512).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_generate_streams_text_and_sums_up(folder, capsys):
    assert cli.main(["generate", "--model", folder, "--prompt", "ABCABCAB", "--max-new-tokens", "9"]) == 0
    out = capsys.readouterr()
    assert len(out.out.strip()) == 9 and "\033" not in out.out
    assert "9 tokens in" in out.err and "tokens per step" in out.err and "of drafted tokens accepted" in out.err


def test_json_holds_text_tokens_and_the_summary(folder, capsys, tmp_path):
    trace = tmp_path / "t.jsonl"
    arguments = [
        "--prompt",
        "ABC",
        "--max-new-tokens",
        "7",
        "--json",
        "--temperature",
        "0.9",
        "--seed",
        "4",
        "--trace",
        str(trace),
    ]
    texts = []
    for drafter in ("ngram", "none", folder):
        assert cli.main(["generate", "--model", folder, "--drafter", drafter, *arguments]) == 0
        report = json.loads(capsys.readouterr().out)
        texts.append(report["text"])
        assert len(report["tokens"]) == report["num_tokens"] == 7
    assert texts[0] == texts[1] == texts[2]
    assert len({json.loads(line)["run"] for line in trace.read_text().splitlines()}) == 3


def test_prompts_from_a_file_standard_input_and_a_chat(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("ABC")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ABC")))
    texts = []
    for source in (
        ["--prompt-file", str(tmp_path / "p.txt")],
        ["--prompt-file", "-"],
        ["--prompt", "ABC"],
        ["--chat", "ABC"],  # the template adds a letter
    ):
        assert cli.main(["generate", "--model", folder, "--max-new-tokens", "5", "--json", *source]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_models_lists_names(capsys):
    assert cli.main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "one of the arguments --prompt"),
        (["generate", "--prompt", "A", "--chat", "A"], "not allowed with"),
        (["generate", "--prompt", "A", "--max-new-tokens", "0"], "at least 1"),
        (["generate", "--prompt", "A", "--max-new-tokens", "many"], "at least 1"),
        (["generate", "--prompt", ""], "empty"),
        (["generate", "--prompt-file", "/no/such/file"], "cannot be read"),
        (["generate", "--prompt", "A", "--temperature", "-1"], "at least 0"),
        (["generate", "--prompt", "A", "--top-p", "2", "--temperature", "1"], "--top-p"),
        (["generate", "--prompt", "A", "--tree", "tall"], "'chain:5'"),
        (["generate", "--prompt", "A", "--verify", "luck"], "match, residual, typical"),
        (["generate", "--prompt", "A", "--verify", "residual", "--temperature", "1"], "verify='match'"),
        (["generate", "--prompt", "A", "--dtype", "int3"], "no floating-point dtype"),
        (["generate", "--prompt", "A", "--device", "tpu9"], "cannot be used here"),
        (["generate", "--prompt", "A", "--drafter", "./none-such"], "no such folder"),
        (["generate", "--prompt", "A", "--trace", "/no/such/folder/t.jsonl"], "/no/such/folder/t.jsonl"),
        (["generate", "--prompt", "A", "--max-new-tokens", "9" * 15], "GB for keys and values"),
        (["demo", "--drafter", "none"], "choose a drafter"),
        (["demo", "--tree", "tall", "--executor", "eager"], "'chain:5'"),
        (["plan", "--calibrate", "p.jsonl", "--temperature", "-1"], "at least 0"),
        (["plan", "--calibrate", "p.jsonl", "--verify", "luck"], "match, residual, typical"),
        (["dance"], "invalid choice"),
        ([], "required"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(folder, capsys, arguments, words):
    if arguments and arguments[0] in ("generate", "demo"):
        arguments = [*arguments, "--model", folder]
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2
    assert words in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("paceline") and "Traceback" not in captured.err


@pytest.mark.slow
def test_ctrl_c_in_the_middle_keeps_what_was_written(folder, tmp_path):
    """A real process and a real signal, sent once text is streaming."""
    trace = tmp_path / "t.jsonl"
    command = [
        sys.executable,
        "-u",
        "-m",
        "paceline.spec.cli",
        "generate",
        "--model",
        folder,
        "--drafter",
        "none",
    ]
    command += ["--prompt", "A", "--max-new-tokens", "500", "--trace", str(trace)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores the signal
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, preexec_fn=heed, **pipes)
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().endswith("stopped") and "Traceback" not in err
    assert len(trace.read_text().splitlines()) >= 3


def test_colours_only_on_a_terminal_without_no_color(monkeypatch, tokenizer, capsys):
    from paceline.spec import console
    from paceline.spec.trace import Event

    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.colours(Terminal()) and not console.colours(sys.stdout)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.colours(Terminal())
    streamer = console.Streamer(tokenizer, coloured=True)
    streamer.on_step([Event(0, 0, [3, 4, 5], [-1, 0, 1], [1], 6)])
    streamer.end()
    assert capsys.readouterr().out == f"{console.GREEN}{tokenizer.decode([4])}{console.PLAIN}{tokenizer.decode([6])}\n"


def test_the_command_prints_the_seed_that_it_drew(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", "--model", str(tmp_path), "--prompt", "ABCAB", "--max-new-tokens", "8", "--temperature", "1"]
    runs = []
    for more in ([], [], ["--seed", "5"], ["--temperature", "0"]):
        assert cli.main([*command, "--json", *more]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert runs[0]["seed"] != runs[1]["seed"] and [run["seed"] for run in runs[2:]] == [5, None]
    assert cli.main([*command, "--seed", str(runs[0]["seed"])]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == runs[0]["text"] and f"seed {runs[0]['seed']}" in captured.err


def test_the_command_refuses_a_huge_tree_in_one_line(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["generate", "--model", str(tmp_path), "--drafter", "ngram", "--prompt", "ABC", "--tree"]
    for tree in ("100x100x100x100", "99999999x1", "chain:20000"):
        assert cli.main([*command, tree]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"paceline: tree '{tree}' ") and not any("Traceback" in line for line in lines)


def test_tokenizers_that_return_more_than_ids(tmp_path, tokenizer, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "ABC", "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.strip()) == 3
