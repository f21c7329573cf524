"""The training loop: its arithmetic against the obvious, resuming, kills, two processes, what it refuses."""

import functools
import json
import math
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from paceline.spec.target.load import load_target
from paceline.training import config as configuration
from paceline.training import train
from paceline.training.config import Optimisation
from paceline.training.data.rows import open_data, rows_of_step
from paceline.training.objectives.draft_lm import DraftObjective
from paceline.training.objectives.target import OnlineTarget
from paceline.training.optimisation import adamw, schedule
from paceline.training.train import run
from safetensors.torch import load_file
from training_runs import (
    children,
    exit_codes,
    lines,
    random_rows,
    settings,
    write_data,
    write_target,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = 14  # the steps of `settings`


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("training")
    write_target(path / "target", tokenizer)
    write_data(path / "data", random_rows(10), random_rows(5, seed=1))
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupted."""
    config = settings(folder, "whole")
    assert exit_codes(children(config)) == [0]
    return config


def weights(config, step=LAST):
    return load_file(Path(config.run.folder) / f"step-{step:08d}" / "trainer" / "weights.safetensors")


def assert_same_end(config, other):
    """The same weights, bit for bit, and the same reported figures."""
    last = lines(other)[-1]["step"]
    mine, theirs = weights(config, last), weights(other, last)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert lines(config) == lines(other)


def assert_same_curve(config, other):
    """Every reported figure to 1e-5."""
    for mine, theirs in zip(lines(config), lines(other), strict=True):
        none = [name for name, value in theirs.items() if value is None]
        assert all(mine.pop(name) is theirs.pop(name) is None for name in none)
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_a_run_learns_and_leaves_a_drafter_and_its_papers(folder):
    config = settings(folder, "learns", budget__tokens=60 * 4 * 17, run__log_every=20)
    assert run(config) is None
    losses = [line["train/loss"] for line in lines(config) if "train/loss" in line]
    assert losses[-1] < losses[0] / 2
    best = Path(config.run.folder) / "best"
    estimates = {line["step"]: line["eval/tokens_per_step"] for line in lines(config) if "eval/loss" in line}
    state = json.loads((best / "trainer" / "state.json").read_text())
    assert state["best"]["tokens_per_step"] == max(estimates.values()) == estimates[state["step"]] > 2
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in best.iterdir()}
    versions = json.loads((best / "trainer" / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and "git_commit" in versions
    assert len(list(Path(config.run.folder).glob("step-*"))) <= config.run.keep + 1


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_step_is_the_obvious_one_however_it_is_cut(folder, micro_batch):
    """All rows at once, the mean over all counted tokens, torch's own clipping and AdamW."""
    changes = dict(optimisation__micro_batch=micro_batch, optimisation__warm_up=0.0, budget__tokens=1)
    config = settings(folder, f"step-of-{micro_batch}", **changes)
    model, _ = load_target(config.target.model)
    torch.manual_seed(0)
    objective = DraftObjective.build(config.objective, model)
    splits, _ = open_data(config.data.folder)
    rows = rows_of_step(0, 4, len(splits["train"]), config.run.seed)
    batch = splits["train"].batch(rows)
    losses = objective(batch, OnlineTarget(model).view(batch, "train", rows))
    (losses.total / losses.counted).backward()
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optimisation.clip)
    adamw(objective, config.optimisation).step()
    run(config)
    mine = weights(config, 1)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(mine[name], parameter.detach(), rtol=1e-5, atol=1e-5)
    (first, *_) = lines(config)
    assert first["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["train/loss"] == pytest.approx((losses.total / losses.counted).item(), rel=1e-5)


def test_every_row_is_read_once_an_epoch_in_an_order_of_its_own():
    steps = [rows_of_step(step, 4, 10, seed=3) for step in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert rows_of_step(2, 4, 10, seed=4) != steps[2] == rows_of_step(2, 4, 10, seed=3)
    assert sorted(rows_of_step(0, 7, 3, seed=0)) == sorted([0, 1, 2] * 2 + [rows_of_step(0, 7, 3, seed=0)[-1]])


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    options = Optimisation(warm_up=0.1, final=0.2)
    shares = [schedule(step, 100, options) for step in range(100)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1.0 and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[55] == pytest.approx(0.6) and shares[-1] == pytest.approx(0.2, abs=1e-3)
    assert schedule(0, 1, Optimisation(warm_up=0.0)) == 1.0


def test_groups_have_their_own_rates_and_vectors_do_not_decay(folder):
    model, _ = load_target(folder / "target")
    objective = DraftObjective.build({"kind": "draft_lm", "layers": [0]}, model)
    options = Optimisation(learning_rate=1e-3, learning_rates={"embeddings": 1e-4}, weight_decay=0.3)
    for group in adamw(objective, options).param_groups:
        embeddings = group["params"][0] is objective.model.get_input_embeddings().weight
        assert group["lr"] == (1e-4 if embeddings else 1e-3)
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])
    with pytest.raises(ValueError, match="no group 'embedings', did you mean 'embeddings'"):
        adamw(objective, Optimisation(learning_rates={"embedings": 1.0}))


def test_kill_9_at_ten_random_moments_changes_nothing(folder):
    """The weights, bit for bit, and every reported figure are those of a run that was left alone."""
    long = dict(budget__tokens=60 * 4 * 17, run__log_every=5)
    config, whole = settings(folder, "killed", **long), settings(folder, "left-alone", **long)
    assert exit_codes(children(whole)) == [0]
    chance = random.Random(0)
    metrics = Path(config.run.folder) / "metrics.jsonl"
    for kill in range(10):
        (process,) = children(config, resume=True)
        before = metrics.stat().st_size if metrics.exists() else 0
        while kill % 2 and process.is_alive() and not (metrics.exists() and metrics.stat().st_size != before):
            time.sleep(0.002)  # every second time until it trains
        time.sleep(chance.random() * (0.06 if kill % 2 else 0.3))
        assert process.is_alive(), "the run was over before it could be killed"
        process.kill()
        process.join()
    assert exit_codes(children(config, resume=True)) == [0]
    assert_same_end(config, whole)
    assert not [path for path in Path(config.run.folder).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_and_the_run_goes_on(folder, whole, number):
    config = settings(folder, f"signal-{number}", run__save_every=100)
    (process,) = children(config)
    metrics = Path(config.run.folder) / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, number)
    assert exit_codes([process]) == [128 + number]
    state = json.loads((Path(config.run.folder) / "latest" / "trainer" / "state.json").read_text())
    assert 0 < state["step"] < LAST
    assert exit_codes(children(config, resume=True)) == [0]
    mine, theirs = weights(config), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_two_processes_give_the_curve_of_one_and_resume_exactly(folder, whole):
    config = settings(folder, "two")
    assert exit_codes(children(config, ranks=2)) == [0, 0]
    assert_same_curve(config, whole)
    killed = settings(folder, "two-killed")
    processes = children(killed, ranks=2)
    while not (Path(killed.run.folder) / "step-00000006").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
    exit_codes(processes)
    assert exit_codes(children(killed, resume=True, ranks=2)) == [0, 0]
    assert_same_end(killed, config)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_signal_to_one_of_two_processes_stops_both(folder, sharded):
    config = settings(folder, f"two-stopped-{sharded}", run__save_every=100)
    processes = children(config, ranks=2, sharded=sharded)
    metrics = Path(config.run.folder) / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert exit_codes(processes) == [143, 143]
    assert (Path(config.run.folder) / "latest" / "trainer" / "state.json").exists()


def test_resuming_with_something_else_is_refused_and_named(folder, whole, tokenizer, tmp_path):
    write_target(tmp_path / "target", tokenizer, seed=5)
    write_data(tmp_path / "data", random_rows(10, seed=9), random_rows(5, seed=1))
    for changes, words in (
        ({"objective__layers": [0]}, "objective.layers is [0] now and was [1]"),
        ({"objective__losses": {"jsd": 1}}, "objective.losses.jsd is 1 now and was None"),
        ({"data": {"folder": str(tmp_path / "data")}}, "data is"),
        ({"target": {"model": str(tmp_path / "target")}}, "target is"),
        ({"run__seed": 3}, "order.seed is 3 now and was 0"),
    ):
        with pytest.raises(ValueError) as error:
            run(settings(folder, "whole", **changes), resume=True)
        assert words in str(error.value) and "cannot be resumed" in str(error.value)
    with pytest.raises(ValueError, match="go on with it by --resume"):
        run(settings(folder, "whole"))


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


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(folder):
    """The limit on file sizes fails real writes, as a full disk would."""
    config = settings(folder, "full", budget__tokens=1)
    run(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"step 2 cannot be written .* that of step 1 is kept; free some space"):
            run(settings(folder, "full", budget__tokens=2 * 4 * 14), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in sorted(Path(config.run.folder).glob("*step-*"))] == ["step-00000001"]
    assert (Path(config.run.folder) / "latest").resolve().name == "step-00000001"


def test_offline_hidden_states_train_as_the_target_itself(folder, whole):
    config = settings(folder, "offline", target__hidden="offline")
    run(config)
    assert_same_curve(config, whole)
    (kept,) = (folder / "data").glob("hidden-*")
    assert sorted(path.name for path in kept.iterdir()) == ["held_out-000000.safetensors", "train-000000.safetensors"]
    (kept / "train-000000.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="holds no hidden states"):
        run(settings(folder, "offline-2", target__hidden="offline"))


def test_mixed_precision_trains(folder):
    config = settings(folder, "bf16", optimisation__mixed_precision="bf16", run__log_every=1)
    assert exit_codes(children(config)) == [0]
    losses = [line["train/loss"] for line in lines(config) if "train/loss" in line]
    assert losses[-1] < losses[0] and all(tensor.dtype == torch.float32 for tensor in weights(config).values())


@pytest.fixture
def new_accelerator():
    """Calls let the next accelerator of this process have another precision."""
    reset = functools.partial(AcceleratorState._reset_state, reset_partial_state=True)
    reset()
    yield reset
    reset()


@pytest.mark.parametrize("emulated", [True, False])
def test_automatic_precision_is_resolved_and_a_resume_checks_it(folder, monkeypatch, new_accelerator, emulated):
    def set_up(emulated: bool) -> None:
        monkeypatch.setattr(train, "has_bfloat16", lambda: True)
        monkeypatch.setattr(train, "emulates_bfloat16", lambda device: emulated)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not emulated)

    set_up(emulated)
    config = settings(folder, f"auto-{emulated}", optimisation__mixed_precision="auto")
    run(config)
    used = "no" if emulated else "bf16"
    kept = configuration.load(Path(config.run.folder) / "latest" / "trainer" / "config.yaml")
    assert kept.optimisation.mixed_precision == used
    set_up(not emulated)
    new_accelerator()
    with pytest.raises(ValueError, match=f"mixed_precision is '.*' now and was '{used}'"):
        run(config, resume=True)


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
