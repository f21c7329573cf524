"""`paceline generate` on a streamed target: a line for each step, and what is there when it is stopped."""

import json
import sys

import pytest
from paceline.spec import cli
from paceline.spec.cli import commands
from paceline.spec.console import Progress, ends_full, step_line
from paceline.spec.stream.record import StreamError
from paceline.spec.trace import Event, Fetched
from stream.pretending import pretending

from support.models import tiny_llama

STEP = [Event(0, 3, [5, 6, 7], [-1, 0, 1], [1, 2], 9, {"verify": 1.0, "wait": 3.0}, "", Fetched(3_200_000_000, 4.0))]
COMMAND = ["generate", "--prompt", "ABC", "--drafter", "ngram", "--max-new-tokens", "8"]


@pytest.fixture
def streamed(monkeypatch, tokenizer):
    """A streamed model, as far as the command can tell."""
    model = tiny_llama(max_position_embeddings=512)
    monkeypatch.setattr(commands, "load_target", lambda *args, **options: (model, tokenizer))
    with pretending(model):
        yield model


def broken_off(model, forwards, error):
    """Raise `error` in the forward after so many."""
    left = [forwards]

    def fail(*ignored):
        left[0] -= 1
        if left[0] < 0:
            raise error

    return model.register_forward_pre_hook(fail)


def test_a_step_in_words():
    said = "step 7: 46 of 64 tokens (+3), 4.0 s (3.0 s waiting for weights), 0.80 GB/s"
    assert step_line(7, 46, 64, STEP) == said


def test_when_a_row_of_a_terminal_is_full():
    lines = "", "abc", "abcd", "水水", "abc水", "abc水de", "abce\u0301", "abcdabcd", "abcdabc"
    assert [line for line in lines if ends_full(line, 4)] == ["abcd", "水水", "abc水de", "abce\u0301", "abcdabcd"]


def test_the_line_goes_before_text_comes(capsys, monkeypatch):
    progress = Progress(64)
    progress.show(STEP)
    progress.clear()
    assert capsys.readouterr().err == "", "no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    progress = Progress(64)
    progress.show(STEP)
    assert capsys.readouterr().err == "\r\033[Kstep 1: 3 of 64 tokens (+3), ", "cut, so that it is one line"
    progress.clear()
    progress.clear()
    assert capsys.readouterr().err == "\r\033[K", "once"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress(64)
    progress.show(STEP, "x" * 29)
    shown = capsys.readouterr().err
    assert shown.startswith("\033D\033[A\0337\033[B\r\033[Kstep 1") and shown.endswith("\0338")
    progress.clear()
    assert capsys.readouterr().err == "\033[J"
    progress.show(STEP, "x" * 60)
    assert capsys.readouterr().err == "", "behind a full line the cursor stands between two"


def test_generate_shows_steps_and_sums_them_up(streamed, capsys, monkeypatch):
    assert cli.main([*COMMAND, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weights_bytes"] == 3_000_000 * said["num_spec_steps"] and "stopped" not in said
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(COMMAND) == 0
    shown = capsys.readouterr()
    assert shown.err.count(" waiting for weights), 0.01 GB/s") == said["num_spec_steps"]
    assert "waited 0.0 s for weights, 0." in shown.err.splitlines()[-1] and "at 0.01 GB/s" in shown.err
    assert shown.out.strip() == said["text"].strip()


@pytest.mark.parametrize("error, code, sentence", [
    (KeyboardInterrupt(), 130, "stopped"),
    (StreamError("layer-003.bin was cut short; repack it"), 2, "paceline: layer-003.bin was cut short; repack it"),
])  # fmt: skip
def test_what_is_there_is_kept_when_it_is_stopped(streamed, capsys, error, code, sentence):
    assert cli.main([*COMMAND, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["tokens"]
    for options in ([], ["--json"]):
        hook = broken_off(streamed, 3, error)
        try:
            assert cli.main([*COMMAND, *options]) == code
        finally:
            hook.remove()
        shown = capsys.readouterr()
        assert shown.err.splitlines()[-1] == sentence
        if options:
            said = json.loads(shown.out)
            assert 0 < len(said["tokens"]) < len(whole) and said["tokens"] == whole[: len(said["tokens"])]
            assert said["stopped"] == (str(error) or "Ctrl-C")
        else:
            assert shown.out.endswith("\n") and shown.out.strip() and "tokens per step" in shown.err


def test_an_error_that_nobody_foresaw_keeps_the_text_too(streamed, capsys):
    hook = broken_off(streamed, 3, RuntimeError("out of memory"))
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            cli.main([*COMMAND, "--json"])
    finally:
        hook.remove()
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] and said["stopped"] == "out of memory"
