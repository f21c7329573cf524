"""Two processes, by DDP and by FSDP2 as `configs/fsdp2.yaml` sets it up, beside one, on the CPU with gloo."""

import json
import shutil
import time
from pathlib import Path

import paceline
import pytest
import torch
from paceline.spec.target.load import load_target

from support.training_runs import (
    assert_same_curve,
    assert_same_end,
    children,
    exit_codes,
    lines,
    settings,
    weights,
    write_both,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
LAST, MIDDLE = 8, 4  # steps; the middle one is saved right after an evaluation
OBJECTIVES = {
    "draft": {"kind": "draft_lm", "layers": [1], "embeddings": "target", "losses": {"forward_kl": 1.0}},
    "hydra": {"kind": "medusa", "mode": "hydra", "heads": 3, "known_tokens": 40, "target_weight": 0.5},
}
by_kind = pytest.mark.parametrize("kind", list(OBJECTIVES))
by_way = pytest.mark.parametrize("way", ["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_both(tmp_path_factory.mktemp("processes"), tokenizer)


def settings_of(folder, kind, name, **changes):
    """A run of 8 steps that keeps the checkpoint of the middle one."""
    often = {"run__save_every": MIDDLE, "run__evaluate_every": MIDDLE, "run__keep": 9}
    return settings(folder, f"{kind}-{name}", objective=OBJECTIVES[kind], budget__tokens=460, **often, **changes)


def trained(config, way="one", resume=False):
    """Train to the end, in one process, or in two that take two micro-batches a step each."""
    ranks = 1 if way == "one" else 2
    assert exit_codes(children(config, resume, ranks, sharded=way == "fsdp2")) == [0] * ranks
    assert lines(config)[-1]["step"] == LAST
    return config


@pytest.fixture(scope="module")
def whole(folder):
    """Runs that nothing interrupted, each made once: whole(kind, way)."""
    made = {}

    def run(kind, way):
        if (kind, way) not in made:
            cut = {} if way == "one" else {"optimisation__micro_batch": 1}
            made[kind, way] = trained(settings_of(folder, kind, way, **cut), way)
        return made[kind, way]

    return run


def resumed(folder, kind, begun, way):
    """The second half of a run by `way`, of which the checkpoint in the middle is all that is left of `begun`."""
    config = settings_of(folder, kind, f"{Path(begun.run.folder).name}-then-{way}")
    name = f"step-{MIDDLE:08d}"
    shutil.copytree(Path(begun.run.folder) / name, Path(config.run.folder) / name)
    shutil.copy(Path(begun.run.folder) / "metrics.jsonl", config.run.folder)
    return trained(config, way, resume=True)


def assert_close_weights(config, other):
    mine, theirs = weights(config, LAST), weights(other, LAST)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-5)


@by_kind
@by_way
def test_two_processes_learn_what_one_does(whole, kind, way):
    assert_same_curve(whole(kind, way), whole(kind, "one"))
    assert_close_weights(whole(kind, way), whole(kind, "one"))


@by_kind
def test_weights_and_moments_are_shared_out_by_fsdp2_alone(whole, kind):
    def shares(way):
        return [json.loads((Path(whole(kind, way).run.folder) / f"shares-{rank}.json").read_text()) for rank in (0, 1)]

    assert all(share["held"] == share["whole"] for share in shares("ddp"))
    first, second = shares("fsdp2")
    assert first["whole"] == second["whole"] == first["held"] + second["held"] == shares("ddp")[0]["whole"]
    assert 0 < second["held"] <= first["held"]


@by_kind
@by_way
def test_a_checkpoint_of_two_processes_resumes_in_one(folder, whole, kind, way):
    config = resumed(folder, kind, whole(kind, way), "one")
    assert_same_curve(config, whole(kind, "one"))
    assert_close_weights(config, whole(kind, "one"))


@by_kind
@by_way
def test_a_checkpoint_of_one_process_resumes_in_two(folder, whole, kind, way):
    config = resumed(folder, kind, whole(kind, "one"), way)
    assert_same_curve(config, whole(kind, "one"))
    assert_close_weights(config, whole(kind, "one"))


@by_kind
@by_way
def test_the_drafter_of_two_processes_is_that_of_one(whole, kind, way):
    target, _ = load_target(whole(kind, "one").target.model)
    for name in ("best", "latest"):
        mine, theirs = (Path(whole(kind, each).run.folder) / name for each in (way, "one"))
        assert mine.resolve().name == theirs.resolve().name
        drafters = [paceline.load_drafter(path, target) for path in (mine, theirs)]
        assert drafters[0].default_shape == drafters[1].default_shape
        counts = [json.loads((path / "acceptance.json").read_text()) for path in (mine, theirs)]
        assert counts[0] == counts[1]
        states = [(each.heads if kind == "hydra" else each.model).state_dict() for each in drafters]
        for tensor, other in zip(*(state.values() for state in states), strict=True):
            rounding = 2**-7 if kind == "hydra" else 0.0  # heads are saved in bfloat16
            torch.testing.assert_close(tensor, other, rtol=1e-5 + rounding, atol=1e-5)


def test_killed_fsdp2_processes_go_on_exactly(folder, whole):
    config = settings_of(folder, "draft", "killed", optimisation__micro_batch=1)
    processes = children(config, ranks=2, sharded=True)
    while not (Path(config.run.folder) / f"step-{MIDDLE:08d}").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
    exit_codes(processes)
    assert_same_end(trained(config, "fsdp2", resume=True), whole("draft", "fsdp2"))


def test_bfloat16_means_the_same_to_fsdp2_as_to_ddp(folder):
    mixed = {"optimisation__mixed_precision": "bf16"}
    runs = [trained(settings_of(folder, "draft", f"{way}-bf16", **mixed), way) for way in ("ddp", "fsdp2")]
    assert_same_curve(*runs)
    assert_close_weights(*runs)
