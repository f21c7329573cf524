"""500 random command lines: exit code 0 or 2, an error in one sentence, nothing half written, no input touched.

The lines come from the real parser: options and values at random, right and wrong ones, paths that exist and that do
not, outputs that are inputs. Commands that take long are given a device that they refuse.
"""

import argparse
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from paceline.spec import cli
from paceline.spec.cli import catalogue
from paceline.spec.cli.outputs import Output
from paceline.spec.kernels import native

from support import runs
from support.data_runs import ENDS, TEMPLATE
from support.models import fitted_heads, noisy_copy, tiny_llama

LINES = 500
LONG = {"demo", "plan", "profile", "check", "quantise", "serve"}
LIKELY = {"max_new_tokens", "output", "prompts", "count", "temperatures"}
RIGHT = {  # values that make sense, by the name of the option
    "prompts": ["p.jsonl", "other.jsonl", "link.jsonl"], "calibrate": ["p.jsonl"], "exclude": ["other.jsonl"],
    "beginnings": ["notes.txt"], "run": ["run.jsonl"], "runs": ["run.jsonl", "second.jsonl"], "data": ["rows"],
    "sources": ["answers.jsonl", "notes.txt"], "model": ["target"], "tokenizer": ["target"], "config": ["mine.yaml"],
    "drafter": ["ngram", "none", "auto", "draft", "heads", "heads+ngram"], "prompt_file": ["notes.txt", "p.jsonl"],
    "tree": ["2x1", "chain:3", "chain:0", "plan.json"], "verify": ["match", "residual", "typical"],
    "draft_weights": ["16", "q4"], "dtype": ["auto", "float32", "bfloat16"], "weights": ["16"], "device": ["cpu"],
    "executor": ["eager", "auto"], "methods": ["ngram", "ar", "draft:tree=2x1", "ngram:name=short"],
    "temperatures": ["0", "0,0.5"], "source": ["self"], "server": ["localhost"], "overrides": ["target.dtype=none"],
    "shape": ["smollm2-135m"], "executors": ["all", "eager"], "split": ["train"], "prompt": ["AB"], "chat": ["AB"],
    "folder": ["heads"], "hub_id": ["someone/drafter"], "columns": ["prompt=prompt"], "to": ["tgi", "vllm"],
    "max_new_tokens": ["1", "2", "3"], "file": ["notes.txt", "bytes"], "stream": ["disk"], "resident": ["100kB", "1GB"],
}  # fmt: skip
WRONG = {
    "verify": ["luck", ""], "tree": ["tall", "auto", "9999x9999", "p.jsonl", "nowhere.json", ""],
    "drafter": ["target", "rows", "nowhere", "ngram+ngram", "none+none", ""], "draft_weights": ["q3"],
    "dtype": ["int3", "float", "complex64"], "weights": ["q4", "q4-int8", "17"],
    "device": ["meta", "tpu", "cuda:99", "cpu:1", ""], "executor": ["cuda_graph", "fast"],
    "methods": ["ngram:tree=tall", "ngram:rule=luck", "nothing:x=y", "ngram:name=ar", "-", "transformers-assisted", ""],
    "temperatures": ["hot", "-1", "nan", ""], "source": ["you"], "server": ["ftp://here"], "split": ["test"],
    "overrides": ["objective.kind=none", "run.folder", "optimisation.batch=-1", "=", "data.folder=empty", "a.b.c=["],
    "shape": ["gpt-9"], "executors": ["eager,fast", ""], "prompt": [""], "chat": [""], "folder": ["target", "nowhere"],
    "hub_id": ["no one"], "columns": ["prompt", "=", "luck=prompt", "prompt=nothing", ""], "to": ["ollama", ""],
    "max_new_tokens": ["0", "-1", "x", "1.5", "", "99", "9" * 15], "stream": ["tape", "host", ""],
    "resident": ["much", "1kB", "-1GB", ""],
}  # fmt: skip
ANYTHING = [
    "p.jsonl", "other.jsonl", "answers.jsonl", "notes.txt", "run.jsonl", "second.jsonl", "plan.json", "mine.yaml",
    "empty", "bytes", "half.jsonl", "nowhere", "nowhere/file.jsonl", "target", "draft", "heads", "rows", "link.jsonl",
    ".", "", "-", "./p.jsonl", "someone/else/file",
]  # fmt: skip
NEW = ["new.jsonl", "new.json", "new", "new.v1", "deep/er/new.jsonl", "NEW"]
TAKEN = [
    "p.jsonl", "run.jsonl", "notes.txt", "link.jsonl", "target", "target/config.json", "heads/acceptance.json", "rows",
    ".", "", "-", "/dev/null", "nowhere/new", "p.jsonl/new",
]  # fmt: skip
NUMBERS = {
    float: (["0", "0.5", "1"], ["-1", "nan", "inf", "x", "1e999"]),
    int: (["1", "2", "3"], ["0", "-1", "x", "1.5", "", "9999"]),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tokenizer):
    """A folder of all that a command may be given, and of what it may not."""
    import copy

    path = tmp_path_factory.mktemp("desk")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template, chat.eos_token = TEMPLATE, "</s>"
    model = tiny_llama(max_position_embeddings=64)
    model.generation_config.eos_token_id = ENDS
    for name, weights in (("target", model), ("draft", noisy_copy(model))):
        weights.save_pretrained(path / name)
        chat.save_pretrained(path / name)
    fitted_heads(model, "independent", steps=1).save(path / "heads")
    talk = [{"role": "user", "content": "AB"}, {"role": "assistant", "content": "CDEFGH"}]
    for name, entries in (
        ("p.jsonl", [{"prompt": "ABC"}, {"turns": ["DEF", "GH"]}]),
        ("other.jsonl", [{"prompt": "XYZ"}]),
        ("answers.jsonl", [{"messages": talk}, {"text": "ABCDEFGHIJKL"}]),
    ):
        (path / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    runs.write(path / "run.jsonl", lines=runs.records(prompts=2))
    runs.write(path / "second.jsonl", lines=runs.records(prompts=2, seed=1))
    (path / "notes.txt").write_text("AB\nCD\n")
    plan = {"tree": [-1, 0], "tokens_per_step": 1.5, "speedup": 1.2, "seconds_per_step": 1, "plain_seconds": 1}
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "mine.yaml").write_text("objective: {kind: medusa}\ndata: {folder: rows}\nrun: {folder: trained}\n")
    (path / "empty").write_bytes(b"")
    (path / "bytes").write_bytes(bytes(range(256)))
    (path / "half.jsonl").write_text('{"prompt": "A"}\n{"prompt": ')
    (path / "link.jsonl").symlink_to("p.jsonl")
    prepare = [
        "data",
        "prepare",
        str(path / "answers.jsonl"),
        "-o",
        str(path / "rows"),
        "--tokenizer",
        str(path / "target"),
    ]
    assert cli.main([*prepare, "--length", "16"]) == 0
    return path


def steps(parser, names=()):
    """Every command, and every step of one, with its parser."""
    inner = next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
    if inner is None:
        return [(names, parser)]
    return [pair for name, step in inner.items() for pair in steps(step, (*names, name))]


def value(action, chance, mistakes):
    kind = action.type if isinstance(action.type, type) else str
    wrong = chance.random() < mistakes
    if issubclass(kind, Output):
        return chance.choice(TAKEN if wrong else NEW)
    if action.dest in RIGHT and kind is not int:
        return chance.choice(
            chance.choice([WRONG.get(action.dest, ANYTHING), ANYTHING]) if wrong else RIGHT[action.dest]
        )
    if action.choices:
        return chance.choice([str(choice) for choice in action.choices])
    return chance.choice(NUMBERS.get(kind, NUMBERS[int])[wrong])


def line(names, parser, chance):
    """A command line; most options that are not needed are left out, and half of the lines have no mistakes in them."""
    mistakes = chance.choice([0, 0.2])
    needed = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    chosen = [chance.choice(actions) for actions in needed if chance.random() < 0.97]
    options, positionals = [], []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or any(action in actions for actions in needed):
            continue
        likely = 0.97 if action.required or action.dest in LIKELY else 0.12
        if action.dest == "threads" or chance.random() > (1 if action.dest == "model" else likely):
            continue
        chosen.append(action)
    for action in chosen:
        count = {"+": chance.choice([1, 2]), "*": 1, None: 1, "?": 1}.get(action.nargs, action.nargs)
        values = [value(action, chance, mistakes) for _ in range(count)]
        if not action.option_strings:
            positionals += values
        else:
            options.append([action.option_strings[-1], *values])
    if names[0] == "train":
        positionals.append(chance.choice(RIGHT["overrides"] + WRONG["overrides"]))
    chance.shuffle(options)
    if names[0] in LONG:
        options.append(["--device", "meta"])
    if chance.random() < 0.1 * mistakes:
        options.append([chance.choice(["--lucky", "--", "-x", "--help", "--version"])])
    return [*names, *positionals, *(part for option in options for part in option)]


def contents(path):
    """Everything in a folder, by name."""
    made = {}
    for folder, inner, files in os.walk(path):
        made |= {os.path.join(folder, name): None for name in inner}
        made |= {str(file): file.read_bytes() for file in (Path(folder, name) for name in files)}
    return made


def written(arguments):
    """The paths that a command line says will be written."""
    args = catalogue.make_parser().parse_known_args(arguments)[0]
    given = [item for item in vars(args).values() if isinstance(item, Output)]
    if args.command == "evaluate" and not given:
        return [os.path.realpath(args.drafter)]
    return [os.path.realpath(path) for output in given for path in output.paths()]


def read_again(arguments, name, data):
    """Read a file of a command whose files are JSON; a half of one raises ValueError."""
    if arguments[0] == "evaluate" or name.endswith(".run.json"):
        json.loads(data)
    elif arguments[0] in ("bench", "generate") or arguments[:2] == ["data", "generate"]:
        assert data.endswith(b"\n") and all(json.loads(line) for line in data.splitlines())


def restore(before, after):
    for name in sorted(after.keys() - before.keys(), reverse=True):
        Path(name).rmdir() if after[name] is None else Path(name).unlink()
    for name in after.keys() & before.keys():
        if after[name] != before[name]:
            Path(name).write_bytes(before[name])


def run(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return ended.code


def check_refusal(out, err, changed):
    *before, last = err.splitlines()
    assert last.startswith("paceline") and len(last) < 600 and not any("paceline:" in line for line in before)
    assert not changed and "{" not in out


def check_success(arguments, changed):
    said = written(arguments) if changed else []
    for name, data in changed.items():
        real = os.path.realpath(name)
        assert any(f"{real}/".startswith(f"{path}/") or path.startswith(f"{real}/") for path in said), name
        assert not os.path.basename(name).startswith("."), name
        if data:
            read_again(arguments, name, data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::paceline.spec.arguments.BeyondContext")
def test_random_command_lines(desk, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(desk)
    native.prepare()  # in the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(desk.parent / "cache"))
    commands = [pair for pair in steps(catalogue.make_parser()) if pair[0][0] not in ("models", "drafters")]
    chance, codes, before = random.Random(22), Counter(), contents(desk)
    capsys.readouterr()
    for _ in range(LINES):
        arguments = line(*chance.choice(commands), chance)
        code, (out, err), after = run(arguments), capsys.readouterr(), contents(desk)
        codes[arguments[0], code] += 1
        assert before.keys() <= after.keys(), arguments
        changed = {name: data for name, data in after.items() if name not in before or before[name] != data}
        try:
            assert code in (0, 2) or (arguments[0], code) == ("compare", 1)
            assert "Traceback" not in err and "%|" not in err and "\r" not in err
            check_refusal(out, err, changed) if code == 2 else check_success(arguments, changed)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"paceline {arguments}: code {code}, changed {sorted(changed)}\n{out}{err}") from error
        restore(before, after)
    assert {name for name, code in codes if code == 2} == {names[0] for names, _ in commands}
    passed = {name for name, code in codes if code == 0}
    assert passed >= {"generate", "bench", "report", "compare", "data", "evaluate"}
