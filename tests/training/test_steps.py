"""Training steps: their arithmetic against the obvious, the order of rows, schedules and precision."""

import functools
import json
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

from support.training_runs import (
    children,
    exit_codes,
    lines,
    settings,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
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
