"""No command writes over what it reads, nor two outputs into one file; what cannot be written is found out at once."""

import argparse
import json
import os
import stat
import threading

import pytest
from paceline.spec import cli
from paceline.spec.cli import catalogue, planning
from paceline.spec.cli.outputs import Input, Output, check_files
from paceline.spec.files import check_writable, folders_above, write_output

from support import runs
from support.models import tiny_llama
from support.sentences import sentence


def parsers():
    """Every command, and every step of one, with its parser."""
    waiting = [((), catalogue.make_parser())]
    while waiting:
        names, parser = waiting.pop()
        steps = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
        if steps is None:
            yield names, parser
        else:
            waiting += [((*names, name), step) for name, step in steps.choices.items()]


def options(parser, kind):
    return [action for action in parser._actions if isinstance(action.type, type) and issubclass(action.type, kind)]


def call(names, parser, given):
    """A command line with the values `given` to these options, and something for all else that is required."""
    arguments = list(names)
    asked = [action for action in parser._actions if action.required and action not in given]
    for group in parser._mutually_exclusive_groups:
        if group.required and not set(group._group_actions) & given.keys():
            asked.append(group._group_actions[0])
    for action in [*asked, *given]:
        values = [given.get(action, "something")] * (action.nargs if isinstance(action.nargs, int) else 1)
        arguments += [*action.option_strings[:1], *values]
    return arguments


PAIRS = [
    pytest.param(names, parser, source, target, id=f"{' '.join(names)} {source.dest} {target.dest}")
    for names, parser in parsers()
    for target in options(parser, Output)
    for source in [*options(parser, Input), *options(parser, Output)]
    if source is not target
]


@pytest.mark.parametrize(("names", "parser", "source", "target"), PAIRS)
def test_no_file_is_read_and_written_or_written_twice(names, parser, source, target, tmp_path, capsys):
    file = tmp_path / "file.jsonl"
    file.write_text('{"prompt": "A"}\n')
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "twin").hardlink_to(file)
    before = sorted(tmp_path.iterdir())
    for name in (file, tmp_path / "link", tmp_path / "twin", tmp_path / ".." / tmp_path.name / file.name):
        assert cli.main(call(names, parser, {source: str(file), target: str(name)})) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1, "nothing was loaded"
        assert "is read by this command too" in said.err or "is named for two outputs" in said.err
        assert said.err.startswith("paceline: ") and str(name) in said.err
    assert file.read_text() == '{"prompt": "A"}\n' and sorted(tmp_path.iterdir()) == before


def test_every_option_that_names_a_file_says_whether_it_is_read_or_written():
    commands = list(parsers())
    named = {"FILE", "FOLDER", "RUN", "PROMPTS", "SOURCE", "CONFIG", "DRAFTER", "MODEL"}
    actions = [(names, action) for names, parser in commands for action in parser._actions if action.metavar in named]
    unsaid = [(names, action.dest) for names, action in actions if action.type is None]
    assert unsaid == [(("push",), "folder")] and len(commands) == 19 and len(PAIRS) > 45


@pytest.mark.parametrize("names", [("a.html", "a.html"), ("a.html", "./a.html"), ("a.html", "A.HTML"), ("-", "-")])
def test_two_outputs_are_two_files(tmp_path, monkeypatch, names, capsys):
    """Also on a disk that does not tell capitals apart, where neither is there yet."""
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "run.jsonl")
    assert cli.main(["report", "run.jsonl", "--markdown", names[0], "--json", names[1]]) == 2
    said = capsys.readouterr()
    assert "named for two outputs" in said.err and said.out == "" and os.listdir() == ["run.jsonl"]


def test_what_is_read_of_a_folder_is_not_written_over(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "acceptance.json", "mine.json"):
            (tmp_path / name / file).write_text("{}")
    plan = [
        "plan",
        "--calibrate",
        "p.jsonl",
        "--model",
        str(tmp_path / "one"),
        "--drafter",
        f"{tmp_path / 'two'}+ngram",
    ]
    for file in ("one/config.json", "one/model.safetensors", "two/acceptance.json"):
        assert cli.main([*plan, "-o", str(tmp_path / file)]) == 2
        assert "which this command reads; write to another file" in capsys.readouterr().err
    for file in ("one/mine.json", "two/new.json"):
        assert cli.main([*plan, "-o", str(tmp_path / file)]) == 2
        assert "this command" not in capsys.readouterr().err
    assert (tmp_path / "one" / "mine.json").read_text() == "{}" and not (tmp_path / "two" / "new.json").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "'' names no file"),
        ("-", "'-' names no file"),
        ("folder", "folder is a folder and the output is a file"),
        ("/dev/null", "is no ordinary file"),
        ("nowhere/x.json", "nowhere/x.json cannot be written (No such file or directory)"),
        ("file/x.json", "file/x.json cannot be written (Not a directory)"),
        ("x" * 300, "cannot be written (File name too long)"),
    ],
)
@pytest.mark.parametrize("command", [["plan", "--from", "r.jsonl"], ["evaluate", "ngram", "--prompts", "p"], ["check"]])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    command, output, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    assert cli.main([*command, "-o", output]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
    assert sorted(os.listdir()) == ["file", "folder"] and (tmp_path / "file").read_text() == "mine"


def test_looking_leaves_nothing_and_misses_nothing(tmp_path):
    for options in ({}, {"appended": True}, {"make_folders": True}):
        check_writable(tmp_path / "new", **options)
    check_writable(tmp_path / "some" / "more" / "new", make_folders=True)
    assert not list(tmp_path.iterdir())
    sentence(lambda: check_writable(tmp_path / "some" / "new"), "cannot be written", "choose another place")
    (tmp_path / "file").write_text("mine")
    sentence(lambda: check_writable(tmp_path / "file" / "a" / "b", make_folders=True), "Not a directory")
    (tmp_path / "file").chmod(0o444)
    if os.access(tmp_path / "file", os.W_OK):
        pytest.skip("this user may write to everything")
    sentence(lambda: check_writable(tmp_path / "file"), "Permission denied")


def test_folders_that_an_error_leaves_empty_go(tmp_path):
    with pytest.raises(KeyboardInterrupt), folders_above(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with folders_above(tmp_path / "a" / "b" / "c"):
        pass
    with pytest.raises(ValueError), folders_above(tmp_path / "a" / "b" / "c"):
        raise ValueError
    assert (tmp_path / "a" / "b").is_dir(), "they were there before"


def test_an_output_is_written_whole_where_a_link_leads_and_keeps_its_permissions(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "page", tmp_path / "link"
    link.symlink_to(file)
    write_output(link, "one")
    file.chmod(0o600)
    write_output(link, "two")
    assert link.is_symlink() and file.read_text() == "two" and stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    sentence(lambda: write_output(link, "three"), f"{link} cannot be written (No space left on device)")
    assert file.read_text() == "two" and os.listdir(file.parent) == ["page"]


def test_a_pipe_takes_an_output(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    run, read = runs.write(tmp_path / "run.jsonl"), []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert cli.main(["report", str(run), "--json", str(tmp_path / "pipe")]) == 0
    reader.join(timeout=10)
    assert json.loads(read[0])["methods"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_report_is_written_altogether_or_not_at_all(tmp_path, capsys):
    plain = [record for record in runs.records() if record.method == "ar"]
    run = runs.write(tmp_path / "run.jsonl", {**runs.header(), "methods": runs.header()["methods"][:1]}, plain)
    before = run.read_bytes()
    outputs = ["-o", str(tmp_path / "page.html"), "--picture", str(tmp_path / "picture.svg")]
    assert cli.main(["report", str(run), *outputs]) == 2
    assert "no text of a drafter to draw" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run.jsonl"] and run.read_bytes() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(max_position_embeddings=64).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_plan_that_cannot_be_kept_is_refused_before_measuring(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "measure", lambda *arguments: pytest.fail("it was measured"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "ABC"}\n')
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "p.jsonl"))
    command = ["plan", "--calibrate", str(tmp_path / "p.jsonl"), "--model", folder, "--drafter", "ngram"]
    assert cli.main(command) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_bench_without_a_measurement_does_not_bind_the_next(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "ABC"}\n')
    command = [
        "bench",
        str(tmp_path / "p.jsonl"),
        "-o",
        str(tmp_path / "run.jsonl"),
        "--model",
        folder,
        "--methods",
        "ar",
    ]
    assert cli.main([*command, "--max-new-tokens", "64"]) == 2
    assert "no prompt can be decoded" in capsys.readouterr().err and os.listdir(tmp_path) == ["p.jsonl"]
    assert cli.main([*command, "--max-new-tokens", "4"]) == 0


def test_a_refused_text_leaves_no_trace(folder, tmp_path, capsys):
    trace = str(tmp_path / "t.jsonl")
    command = ["generate", "--model", folder, "--prompt", "A", "--trace", trace, "--max-new-tokens", "8"]
    for more in (["--max-new-tokens", "9" * 15], ["--tree", "tall"], ["--verify", "residual", "--temperature", "1"]):
        assert cli.main([*command, *more]) == 2
    assert not list(tmp_path.iterdir())


def test_values_are_looked_at_in_lists_too(tmp_path):
    (tmp_path / "a").write_text("")
    for values in (
        [[Input(tmp_path / "a")], Output(tmp_path / "a")],
        [[Output(tmp_path / "b")], Output(tmp_path / "b")],
    ):
        sentence(lambda values=values: check_files(values), str(tmp_path))
    check_files([None, 3, "text", Input("nowhere"), Input(""), Output(tmp_path / "a"), Output(tmp_path / "b")])
