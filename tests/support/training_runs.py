"""Tiny targets, data and runs for the tests of training."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from paceline import configs
from paceline.training import config as configuration
from paceline.training.data.packing import pack
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from support.models import tiny_llama

VOCAB = 61
LAST = 14  # the steps of `settings`


def write_target(folder: Path, tokenizer=None, **options) -> Path:
    tiny_llama(**options).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def random_rows(count: int, length: int = 24, seed: int = 0) -> list[dict]:
    """Rows of two documents of different lengths, whose second halves count."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        texts = []
        for tokens in (draw.integers(5, length // 2), draw.integers(5, length // 2 - 1)):
            ids = (draw.integers(0, 4) + np.arange(tokens) * draw.integers(1, 4)) % (VOCAB - 3) + 3  # to be learnt
            texts.append((ids.tolist(), [0] * (tokens // 2) + [1] * (tokens - tokens // 2)))
        rows.append(pack(texts, length))
    return rows


def write_data(folder: Path, train: list[dict], held_out: list[dict], **about) -> Path:
    """As `paceline data prepare` writes it; a split without rows, which Arrow cannot hold, is left out."""
    kinds = {"input_ids": "int32", "loss_mask": "int8", "position_ids": "int32", "document": "int32"}
    features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()})
    splits = {"train": train, "held_out": held_out}
    made = {
        name: datasets.Dataset.from_dict({column: [row[column] for row in rows] for column in kinds}, features)
        for name, rows in splits.items()
    }
    datasets.DatasetDict({name: split for name, split in made.items() if len(split)}).save_to_disk(str(folder))
    (folder / "paceline.json").write_text(json.dumps({"version": 1, **about}))
    return folder


def write_both(folder: Path, tokenizer) -> Path:
    """A target and data for it, as most tests of runs use them; returns `folder`."""
    write_target(folder / "target", tokenizer)
    write_data(folder / "data", random_rows(10), random_rows(5, seed=1))
    return folder


def settings(folder: Path, run: str = "run", **changes) -> configuration.Config:
    """A run of 12 steps of 4 rows, with the target in `folder/target` and the data in `folder/data`."""
    base = {
        "target": {"model": str(folder / "target")},
        "data": {"folder": str(folder / "data")},
        "objective": {"kind": "draft_lm", "layers": [1], "losses": {"forward_kl": 1.0, "cross_entropy": 0.5}},
        "budget": {"tokens": 12 * 4 * 17},
        "optimisation": {"batch": 4, "micro_batch": 2, "learning_rate": 3e-3},
        "run": {"folder": str(folder / run), "save_every": 3, "evaluate_every": 4, "log_every": 1},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        base[section] = {**base[section], key: value} if key else value
    return configuration.read(configuration.Config, base)


def lines(config: configuration.Config) -> list[dict]:
    """What a run reported, without what depends on the clock."""
    path = Path(config.run.folder) / "metrics.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in read]


def train_in_process(config: configuration.Config, resume: bool, rank: int, ranks: int, port: int, sharded: bool):
    """For a child process: train as one of `ranks` processes on the CPU."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    torch.set_num_threads(1)
    os.environ |= {"TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        _write_shares(Path(config.run.folder), rank)
    if sharded:
        os.environ |= fsdp2()
    from paceline.training.train import run

    stopped = run(config, resume=resume)
    raise SystemExit(0 if stopped is None else 128 + stopped)


def _write_shares(folder: Path, rank: int) -> None:
    """Let this process write at every save how many numbers of weights and moments it holds, and how many there are."""
    from paceline.training.checkpoint import trained
    from paceline.training.trainer import Trainer

    save = Trainer.save

    def counting(trainer: Trainer) -> None:
        save(trainer)
        parameters = [parameter for _, parameter in trained(trainer.objective)]
        tensors = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in parameters] + parameters
        held = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        counts = {name: sum(map(torch.numel, these)) for name, these in (("held", held), ("whole", tensors))}
        (folder / f"shares-{rank}.json").write_text(json.dumps(counts))

    Trainer.save = counting


def fsdp2() -> dict[str, str]:
    """What `accelerate launch --config_file configs/fsdp2.yaml` puts into the environment of FSDP2."""
    settings = yaml.safe_load((Path(configs.__file__).parent / "fsdp2.yaml").read_text(encoding="utf-8"))
    named = {name.upper(): str(value) for name, value in settings["fsdp_config"].items()}
    return {"ACCELERATE_USE_FSDP": "true", **named}


def children(config: configuration.Config, resume: bool = False, ranks: int = 1, sharded: bool = False) -> list:
    """Start a run in `ranks` processes, by DDP or sharded by FSDP2, forked from one that has imported all there is to
    import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["support.training_runs", "paceline.training.train", "paceline.training.objectives.draft_lm"]
    )
    port = free_port()
    arguments = [(config, resume, rank, ranks, port, sharded) for rank in range(ranks)]
    processes = [context.Process(target=train_in_process, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list) -> list[int | None]:
    """The exit codes; None for one that hangs, which is ended."""
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


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
