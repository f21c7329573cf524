"""What cannot be trained on or with is named before it does harm."""

import math
from pathlib import Path

import pytest
from paceline.spec import cli
from paceline.training import config as configuration
from paceline.training.data.rows import open_data, rows_of_step
from paceline.training.objectives.draft_lm import DraftObjective
from paceline.training.train import run
from safetensors.torch import load_file

from support.training_runs import (
    lines,
    random_rows,
    settings,
    write_data,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_no_number_stops_before_it_does_harm(folder, monkeypatch):
    config = settings(folder, "nan")
    forward = DraftObjective.forward
    bad = rows_of_step(8, 4, 10, 0)[0]
    splits, _ = open_data(config.data.folder)
    poison = splits["train"].batch([bad])["input_ids"][0]
    after = []

    def poisoned(self, batch, seen):
        losses = forward(self, batch, seen)
        if (batch["input_ids"] == poison).all(1).any() and self.training:
            after.append(1)
            if len(after) > 4:  # it has been measured and seen before
                losses = losses._replace(total=losses.total * math.nan)
        return losses

    monkeypatch.setattr(DraftObjective, "forward", poisoned)
    with pytest.raises(ValueError, match=r"not a finite number on rows \[.*\] .* the checkpoint of step \d+ is kept"):
        run(config)
    for tensor in load_file(Path(config.run.folder) / "latest" / "trainer" / "weights.safetensors").values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__kind": "draftlm"}, "objective.kind is 'draftlm', did you mean 'draft_lm'?"),
        ({"objective__layer": [1]}, "unknown key 'objective.layer', did you mean 'layers'?"),
        ({"objective__losses": {"jsd": 0}}, "sum to zero"),
        ({"data__folder": "/no/such/data"}, "make it with paceline data prepare"),
        ({"target__model": "./nothing"}, "there is no such folder"),
        ({"run__trackers": ["mlflow"]}, "tracker mlflow is not installed"),
        ({"optimisation__mixed_precision": "fp16"}, "accelerate trains in float32 instead on a CPU"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(folder, changes, words):
    with pytest.raises(ValueError) as error:
        run(settings(folder, "mistake", **changes))
    assert words in str(error.value)


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_read(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for run_folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="cannot be written"):
            run(settings(folder, run__folder=str(run_folder), data__folder="/no/such/data"))
    (tmp_path / "metrics.jsonl").write_text('{"prompt": "AB"}\n')
    with pytest.raises(ValueError, match="is read by this command too"):
        run(settings(folder, run__folder=str(tmp_path), run__decode_prompts=str(tmp_path / "metrics.jsonl")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "metrics.jsonl"]


def test_a_configuration_stays_as_it_was_written(folder, tmp_path, capsys):
    """In the run's folder it is in the way of the resolved one; the resolved one may resume the run."""
    base = settings(folder, run__folder=str(tmp_path / "run"), budget__tokens=1)
    (tmp_path / "run").mkdir()
    mine = tmp_path / "run" / "config.yaml"
    mine.write_text("# my words\n" + configuration.dump(base))
    before = mine.read_bytes()
    assert cli.main(["train", str(mine)]) == 2
    assert f"{mine} is read by this command too" in capsys.readouterr().err and mine.read_bytes() == before
    mine.rename(tmp_path / "mine.yaml")
    assert cli.main(["train", str(tmp_path / "mine.yaml")]) == 0
    resolved = mine.read_bytes()
    assert b"# my words" not in resolved and cli.main(["train", str(mine), "--resume"]) == 0
    assert mine.read_bytes() == resolved and (tmp_path / "mine.yaml").read_bytes() == before


def test_other_ways_of_sharding_are_refused(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"set up for FSDP 1; use DDP .* or FSDP2"):
        run(settings(folder, "fsdp1"))


def test_data_that_cannot_be_trained_on(folder, tmp_path):
    silent = random_rows(3)
    for row in silent:
        row["loss_mask"] = [0] * len(row["loss_mask"])
    for name, rows, about, words in (
        ("silent", silent, {}, "no token of the target's own text"),
        ("empty", [], {}, "no rows to train on"),
        ("foreign", random_rows(3), {"tokenizer": "f00"}, "prepared with another tokenizer"),
    ):
        data = write_data(tmp_path / name, rows, random_rows(1), **about)
        with pytest.raises(ValueError, match=words):
            run(settings(folder, "no-data", data__folder=str(data)))


def test_held_out_text_may_be_missing(folder, tmp_path):
    data = write_data(tmp_path / "data", random_rows(4), [])
    config = settings(folder, "unevaluated", data__folder=str(data), budget__tokens=1)
    assert run(config) is None
    assert not [line for line in lines(config) if "eval/loss" in line]
