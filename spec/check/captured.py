"""Checks of captured steps, apart from the text: one capture serves other prompts, its report can be read one step
late, replaying it never waits for the device, and memory does not grow.
"""

from collections.abc import Iterator

import torch

from ..engines.executors import Executor
from ..engines.pool import pool_of
from ..generate import SpeculativeOutput, generate
from ..rows import Rows
from ..step import Engine, step
from ..trace import Event
from .budget import NotHere, Task, single
from .record import FAILS, Finding
from .subject import Subject

PROMPTS, STEPS = 10, 200


def captured_tasks(subject: Subject, executor: str, new_tokens: int) -> Iterator[Task]:
    """The checks of a captured step, with prompt lookup on one row."""
    promises = {
        f"one capture for {PROMPTS} prompts, read one step late": _serves_other_prompts,
        "a replayed step never waits": _never_waits,
        f"memory is flat over {STEPS} steps": _memory_is_flat,
    }
    for promise, show in promises.items():
        labels = {"promise": promise, "executor": executor}
        yield Task(labels, single(show, subject, labels, new_tokens))


def _decode(subject: Subject, executor: str, seed: int, new_tokens: int) -> tuple[torch.Tensor, list[Event]]:
    """Decode a random prompt greedily: the text and its events."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(subject.vocabulary // 8, subject.vocabulary, (1, 4 + seed), generator=generator)
    ids = torch.cat([half, half], dim=1).to(subject.device)
    out = generate(
        subject.model, ids, drafter=subject.drafter("ngram"), tree="2x1x1", executor=executor, do_sample=False,
        max_new_tokens=new_tokens, pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(out, SpeculativeOutput) and out.trace is not None
    return out.sequences, out.trace.events


def _serves_other_prompts(subject: Subject, labels: dict, new_tokens: int) -> Finding:
    """Equal events, step by step, show that each report was read before the next step wrote over it."""
    executor, made, parted = labels["executor"], [], 0
    for seed in range(PROMPTS):
        plain, plain_events = _decode(subject, "eager", seed, new_tokens)
        before = len(pool_of(subject.model).runs)
        replayed, events = _decode(subject, executor, seed, new_tokens)
        made.append(len(pool_of(subject.model).runs) - before)
        if not torch.equal(plain, replayed):  # judged by the check of texts
            parted += 1
            continue
        steps = [[(e.tokens, e.accepted, e.bonus) for e in events_of_run] for events_of_run in (plain_events, events)]
        if steps[0] != steps[1]:
            number = next((i for i, pair in enumerate(zip(*steps)) if pair[0] != pair[1]), min(map(len, steps)))
            return Finding(labels, FAILS, f"step {number} on prompt {seed} is not what the eager step does")
    if sum(made[1:]):
        return Finding(labels, FAILS, f"{1 + sum(made[1:])} steps were captured for prompts of one shape")
    if parted and subject.dtype in (torch.float32, torch.float64):
        return Finding(labels, FAILS, f"{parted} of {PROMPTS} texts are not those of eager steps")
    if parted == PROMPTS:
        raise NotHere("every text parts from that of eager steps, so that no step can be compared")
    return Finding(labels, figures={"texts": PROMPTS, "parted": parted})


def _runner(subject: Subject, executor: str) -> tuple[Engine, Executor]:
    """The engine most recently kept for `executor`, and its executor. Raises NotHere where there is none."""
    if subject.device.type != "cuda":
        raise NotHere("needs CUDA")
    kept = [run for run in pool_of(subject.model).runs if run.spec.executor == executor]
    if not kept:
        raise NotHere("no step was captured")
    kept[-1].wake(subject.model)
    return kept[-1].engine, kept[-1].executor


@torch.no_grad()
def _never_waits(subject: Subject, labels: dict, new_tokens: int) -> Finding:
    engine, executor = _runner(subject, labels["executor"])
    engine.idle_step()
    torch.cuda.synchronize(subject.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(engine, lambda phase: None)
        executor.run(lambda phase: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Finding(labels)


@torch.no_grad()
def _memory_is_flat(subject: Subject, labels: dict, new_tokens: int) -> Finding:
    engine, executor = _runner(subject, labels["executor"])
    engine.idle_step()
    rows = Rows(executor, chunk=1)
    for _ in range(10):  # allocates the buffers for reading reports
        rows.step()
    before = torch.cuda.memory_allocated(subject.device)
    for _ in range(STEPS):
        rows.step()
    torch.cuda.synchronize(subject.device)
    grown = torch.cuda.memory_allocated(subject.device) - before
    if grown > 0:
        return Finding(labels, FAILS, f"{grown:,} bytes more are allocated after {STEPS} steps")
    return Finding(labels)
