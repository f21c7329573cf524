"""A run that was killed, stopped, cut or fed otherwise ends as one that nothing interrupted."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from paceline.training.checkpoint import alone_in
from paceline.training.train import run

from support.training_runs import (
    LAST,
    assert_same_curve,
    assert_same_end,
    children,
    exit_codes,
    lines,
    random_rows,
    settings,
    weights,
    write_data,
    write_target,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupted."""
    config = settings(folder, "whole")
    assert exit_codes(children(config)) == [0]
    return config


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(folder):
    """While it starts, and after one, two and three fifths of the run: the weights, bit for bit, and every reported
    figure are those of a run that was left alone."""
    long = dict(budget__tokens=60 * 4 * 17, run__log_every=5)
    config, whole = settings(folder, "killed", **long), settings(folder, "left-alone", **long)
    assert exit_codes(children(whole)) == [0]
    chance = random.Random(0)
    metrics = Path(config.run.folder) / "metrics.jsonl"
    for kill in range(4):
        (process,) = children(config, resume=True)
        reported = len(lines(whole)) * kill // 5
        while kill and process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= reported):
            time.sleep(0.002)
        time.sleep(chance.random() * (0.06 if kill else 0.3))
        assert process.is_alive(), "the run was over before it could be killed"
        process.kill()
        process.join()
    assert exit_codes(children(config, resume=True)) == [0]
    assert_same_end(config, whole)
    assert not [path for path in Path(config.run.folder).iterdir() if path.name.startswith(".")]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with alone_in(Path(whole.run.folder)), pytest.raises(ValueError, match="is in use by another training"):
        run(settings(folder, "whole"), resume=True)
    with pytest.raises(ValueError, match="go on with it by --resume"):
        run(settings(folder, "whole"))


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
