"""kill -9 at four random moments each: nothing lost, nothing repeated, the same end."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import kills
from support.data_runs import TEMPLATE
from support.models import tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_llama(seed=4)
    model.generation_config.eos_token_id = [2, *range(30, 37)]
    model.save_pretrained(path)
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    chat.save_pretrained(path)
    return str(path)


def killed(count, *arguments):
    """Run the command undisturbed, and killed `count` times; the names of the killed trials."""
    script = Path(kills.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(count), *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [f"trial{number}" for number in range(int(done.stdout.split()[-1]))]


def test_generation_killed_four_times_ends_with_the_same_records(folder, tmp_path):
    source = tmp_path / "p.jsonl"
    entries = [{"turns": [f"A{chr(65 + i % 26)}", "B"] if i % 5 == 0 else [f"A{chr(65 + i % 26)}C"]} for i in range(26)]
    entries += [{"prompt": ""}, {"prompt": "A" * 250}]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    options = [
        "--model",
        folder,
        "--max-new-tokens",
        30,
        "--batch",
        4,
        "--executor",
        "eager",
        "--temperatures",
        "0,0.9",
    ]
    trials = killed(4, "data", "generate", source, "-o", tmp_path / "{}.jsonl", *options)
    for kind in ("jsonl", "problems.jsonl"):
        truth = sorted((tmp_path / f"reference.{kind}").read_text().splitlines())
        assert len(truth) == len(set(truth)) == (52 if kind == "jsonl" else 4)
        for trial in trials:
            assert sorted((tmp_path / f"{trial}.{kind}").read_text().splitlines()) == truth


def test_self_made_prompts_killed_four_times_are_the_same(folder, tmp_path):
    options = ["--model", folder, "--max-new-tokens", 20, "--batch", 4, "--executor", "eager", "--temperatures", "0.9"]
    line = ["data", "generate", "--source", "self", "--count", 60, "-o", tmp_path / "{}.jsonl"]
    trials = killed(4, *line, *options)
    truth = sorted((tmp_path / "reference.jsonl").read_text().splitlines())
    assert len(truth) > 20
    for trial in trials:
        assert sorted((tmp_path / f"{trial}.jsonl").read_text().splitlines()) == truth


def test_preparation_killed_four_times_gives_the_same_bytes(folder, tmp_path):
    source = tmp_path / "d.jsonl"
    records = [{"text": "ABCDEFG" * (1 + i % 17) + chr(65 + i % 50)} for i in range(3000)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    line = ["data", "prepare", source, "-o", tmp_path / "{}" / "set", "--tokenizer", folder, "--length", 64]
    trials = killed(4, *line)
    truth = tree(tmp_path / "reference")
    assert "set/paceline.json" in truth
    for trial in trials:
        assert tree(tmp_path / trial) == truth, "nothing else is left behind either"


def tree(base):
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
