"""What options say of themselves is true, what has no effect is refused, and errors are one line on a terminal too."""

import argparse
import io
import json
import re
import sys

import paceline
import pytest
import torch
from paceline.spec import cli
from paceline.spec.cli import catalogue, commands
from paceline.spec.console import Bar

from support.models import noisy_copy, tiny_llama

# Defaults that help tells in words: where the value is decided, a test below or elsewhere shows it.
TREES = {  # other than the drafter's own
    "evaluate": "the plan that is kept, or one made of what is counted",
    "serve": "auto, by the number of texts at a time",
}
WORDED = {
    "seed": "drawn, and printed",
    "turns": "all",
    "threads": "its own choice",
    "device": "cuda where there is one",
    "length": "1024, or the target's context where that is shorter",
    "tree": "the drafter's own",
}


def described():
    """(command, option, help as it is shown) of every option of every command."""
    waiting = [("", catalogue.make_parser())]
    while waiting:
        name, parser = waiting.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [(f"{name} {step}".strip(), inner) for step, inner in action.choices.items()]
            elif action.help and not isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
                yield name, action, action.help % {**vars(action), "prog": parser.prog}


def test_help_names_every_default_as_it_is():
    told = 0
    for name, action, text in described():
        claims = re.findall(r"\(?default:? ([^()]+?)\)?$", text)
        if action.default is None or action.default is False:
            (claim,) = claims or [None]
            expected = TREES.get(name) if action.dest == "tree" else None
            expected = expected or WORDED.get(action.dest)
            assert claim is None or claim == expected, (name, action.dest, claim)
            continue
        default = action.default[0] if isinstance(action.default, list) else action.default
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert claims == [shown], f"{name} {action.dest}: help says {claims}, and it is {shown}"
        told += 1
    assert told > 60


def test_the_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(commands, "load_target", lambda name, dtype, device, *more, **options: device)
    args = catalogue.make_parser().parse_args(["demo"])
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert commands.load_model(args) == device


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"paceline {paceline.__version__}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models")
    model = tiny_llama(max_position_embeddings=512)
    for name, weights in (("target", model), ("draft", noisy_copy(model))):
        weights.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "p.jsonl").write_text("".join(json.dumps({"prompt": word * 3}) + "\n" for word in ("AB", "CD", "EF")))
    return path


def refusal(said):
    """The lines of a refused command, without that which tells what was read."""
    return [line for line in said.splitlines() if not line.startswith("p.jsonl: read as prompts, 3 of 3 records")]


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "A"], ["data", "generate", "p.jsonl", "-o", "o"], ["demo"], ["evaluate", "none"]],
)
def test_a_tree_without_a_drafter_is_refused(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    none = ["--prompts", "p.jsonl", "-o", "o"] if command[0] == "evaluate" else ["--drafter", "none"]
    arguments = [str(folder / part) if part == "p.jsonl" else part for part in [*command, *none]]
    assert cli.main([*arguments, "--tree", "4x2", "--model", str(folder / "target")]) == 2
    (said,) = refusal(capsys.readouterr().err)
    assert "--tree 4x2 is of guesses" in said or command == ["demo"]


@pytest.mark.parametrize("name", ["plan", "profile"])
def test_commands_that_draft_no_tree_of_the_user_take_none(name, capsys):
    more = ["--calibrate", "p"] if name == "plan" else []
    with pytest.raises(SystemExit) as ended:
        cli.main([name, *more, "--tree", "4x2"])
    assert ended.value.code == 2 and "unrecognized arguments: --tree 4x2" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "--prompt", "A"], ["profile"], ["demo"], ["evaluate", "ngram"]])
def test_the_meta_device_is_refused_in_a_sentence(folder, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    more = ["--prompts", str(folder / "p.jsonl"), "-o", "o"] if command[0] == "evaluate" else []
    assert cli.main([*command, *more, "--model", str(folder / "target"), "--device", "meta"]) == 2
    (said,) = refusal(capsys.readouterr().err)
    assert said == "paceline: device='meta' keeps no numbers to decode with; use 'cpu' or 'cuda'"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """The lines that are seen after `text` was written."""
    lines = []
    for line in text.split("\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    return [line for line in lines if line]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bench", "p.jsonl", "-o", "r", "--methods", "ngram:rule=residual,temperature=1"], "use verify='match'"),
        (["data", "generate", "p.jsonl", "-o", "a", "--executor", "cuda_graph"], "needs CUDA"),
        (["evaluate", "ngram", "--prompts", "p.jsonl", "-o", "e", "--verify", "residual", "--temperature", "1"], "use"),
    ],
)
def test_no_bar_stands_beside_an_error(folder, tmp_path, monkeypatch, command, words):
    terminal = Terminal()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", terminal)
    command = [str(folder / part) if part == "p.jsonl" else part for part in command]
    assert cli.main([*command, "--model", str(folder / "target")]) == 2
    assert "0%|" in terminal.getvalue(), "a bar was there"
    (line,) = refusal("\n".join(screen(terminal.getvalue())))
    assert line.startswith("paceline: ") and words in line
    assert not list(tmp_path.iterdir())


def test_a_bar_stays_where_all_went_well_or_a_person_stopped_it():
    for stopped in (False, True):
        terminal = Terminal()
        try:
            with Bar(range(2), desc="counting", file=terminal) as bar:
                for number in bar:
                    if stopped and number:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        (line,) = screen(terminal.getvalue())
        assert line.startswith("counting:") and ("100%" in line) != stopped
