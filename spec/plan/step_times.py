"""Step times on this device, measured.

As all shapes are static, steps in which every row is done cost as much as real ones. So idle engines are timed, at the
length of half their slots. `alone` is for one engine, `in_turns` compares several. Knows nothing of acceptance.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engines.executors import EXECUTORS, Executor, Step
from ..engines.runs import many_scores, open_engine
from ..proposal import Drafter, DraftRequest, DraftSampling, EmptySession, NoDrafter, Proposal
from ..sampling import Sampler
from ..state import DecodeState
from ..step import Engine, unpack_report, walked
from ..stream.streamer import streamer_of
from ..target.protocol import Unscored
from ..target.slots import SlotModel
from ..trace import Trace
from ..tree import DynamicShape, TokenTree, TreeShape

LEAST = 3  # steps that are timed, however long they take
SLOW = {"repeats": 2, "warm_up": 1}  # how often those of a streamed target are, which take seconds
IDLE_CAPACITY = 512  # slots of an engine that is timed; half of them hold text
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Blank(NoDrafter):
    """A drafter that costs almost nothing: its tokens count on from the root, with uniform draft probabilities."""

    def open(self, request: DraftRequest) -> "BlankSession":
        flat = torch.zeros(1, 1, 1, device=request.device).expand(request.batch, len(request.shape), request.vocab_size)
        return BlankSession(TokenTree.of(request.fixed_shape, request.device), flat, request.vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class BlankSession(EmptySession):
    draft_logits: Tensor
    vocabulary: int

    def propose(self, state: DecodeState) -> Proposal:
        tokens = (state.roots() + torch.arange(self.tree.size, device=self.draft_logits.device)) % self.vocabulary
        return Proposal(tokens, self.tree, "without_replacement", "own", self.draft_logits)


def in_turns(
    model: PreTrainedModel, runners: Mapping[Key, Executor], repeats: int, warm_up: int = 3, limit: float = math.inf
) -> dict[Key, float]:
    """Median seconds of a step of each of `runners`, which take turns: `warm_up` turns that do not count, then up to
    `repeats`. No turn begins after `limit` seconds, except for the first one that counts."""
    seconds: dict[Key, list[float]] = {key: [] for key in runners}
    with torch.no_grad():
        begun = time.perf_counter()
        for repeat in range(repeats + warm_up):
            if repeat > warm_up and time.perf_counter() - begun > limit:
                break
            for key, runner in runners.items():
                wait_for(model)
                started = time.perf_counter()
                runner.run(lambda phase: None)
                wait_for(model)
                if repeat >= warm_up:
                    seconds[key].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in seconds.items()}


def alone(model: PreTrainedModel, runner: Executor, repeats: int = 9, warm_up: int = 2, limit: float = 1.5) -> float:
    """Median seconds of a step of `runner`, in a block of `warm_up` steps that do not count and up to `repeats`; of
    those, none but the first `LEAST` begins after `limit` seconds."""
    seconds: list[float] = []
    with torch.no_grad():
        for _ in range(warm_up):
            runner.run(lambda phase: None)
        while len(seconds) < repeats and (len(seconds) < LEAST or sum(seconds) < limit):
            wait_for(model)
            started = time.perf_counter()
            runner.run(lambda phase: None)
            wait_for(model)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def open_idle(
    model: PreTrainedModel,
    executor: str,
    drafter: Drafter,
    shape: TreeShape | DynamicShape,
    capacity: int = IDLE_CAPACITY,
    sampling: DraftSampling | None = None,
    work: Literal["step", "forward", "draft", "walk"] = "step",
    batch: int = 1,
) -> Executor:
    """An executor of an idle engine of `batch` rows, for whole steps, the target forward alone, drafting alone, or the
    verdict on one node of a tree whose scores are not computed at once."""
    capacity = max(capacity, 2 * (shape.slots + 1))
    prompt, sampling = torch.ones(batch, 1, dtype=torch.long, device=model.device), sampling or DraftSampling()
    sampler = Sampler([], sampling.coupling != "none", prompt, prompt[:, 0] * 0)
    rule = "residual" if sampling.coupling == "own" else "match"
    with torch.no_grad():
        unscored = executor == "eager" and many_scores(model, batch, len(shape), rule, sampler.do_sample)
        target = SlotModel(model, batch, capacity, drafter.traits.taps, unscored=unscored)
        engine = open_engine(target, drafter, shape, sampler, sampling, rule, eos=1)
        engine.state.lengths.fill_(capacity // 2)  # attention takes longer with more text
        part = {"step": None, "forward": _forward_alone, "draft": _draft_alone, "walk": _walk_alone}[work]
        return EXECUTORS[executor](engine, part(engine) if part is not None else None)


def _forward_alone(engine: Engine) -> Step:
    """The target forward of a step alone; its proposal is drafted once, beforehand."""
    base, proposal = engine.state.lengths - 1, engine.session.propose(engine.state)
    return lambda engine, mark: engine.target.forward(proposal, base)


def _draft_alone(engine: Engine) -> Step:
    """The drafting of a step alone."""
    return lambda engine, mark: engine.session.propose(engine.state)


def _walk_alone(engine: Engine) -> Step:
    """The verdict on one node; nothing where scores are computed at once."""
    base, proposal = engine.state.lengths - 1, engine.session.propose(engine.state)
    engine.target.forward(proposal, base)  # which finds out
    seen = engine.target.forward(proposal, base)
    if not isinstance(seen, Unscored):
        return lambda engine, mark: None
    return lambda engine, mark: walked(engine, seen, proposal, base)


def step_and_forward_cost(
    model: PreTrainedModel, drafter: Drafter, executor: str, shape: TreeShape | DynamicShape
) -> tuple[float, float]:
    """Seconds of a whole step, drafting included, and of its target forward alone."""
    runs = [open_idle(model, executor, drafter, shape, work=work) for work in ("step", "forward")]
    how = {} if streamer_of(model) is None else SLOW
    step, forward = (min(seconds) for seconds in zip(*([alone(model, run, **how) for run in runs] for _ in range(2))))
    return step, forward


def recording_cost(depth: int, steps: int = 64, repeats: int = 15) -> float:
    """Median seconds of tracing one row of a step with a chain of `depth` tokens, all accepted: reading the report,
    making the event, and writing its line (measured over `steps` events)."""
    nodes = depth + 1
    report = [*range(nodes), *range(-1, depth), *range(nodes), depth, 7, nodes, 0, 0]
    reports, times = torch.tensor([report] * steps), {"draft": 0.01, "verify": 0.03, "commit": 0.001}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            started = time.perf_counter()
            rows = [row for report in reports for row in unpack_report(report[None], nodes)]
            trace = Trace([row.event(0, step, times) for step, row in enumerate(rows)])
            trace.append_to(Path(folder) / "trace.jsonl")
            seconds.append((time.perf_counter() - started) / steps)
    return statistics.median(seconds)


def slot_bytes(model: PreTrainedModel, drafter: Drafter | None = None) -> int:
    """Bytes that one token of one row takes in the target's cache, over all layers, or in the session of `drafter`."""
    drafting = drafter or NoDrafter()
    capacity = 2 * (drafting.default_shape.slots + 32)
    runner = open_idle(model, "eager", drafting, drafting.default_shape, capacity)
    with torch.no_grad():
        runner.run(lambda phase: None)
    engine = runner.engine
    return (engine.target.nbytes if drafter is None else engine.session.nbytes) // capacity


def wait_for(model: PreTrainedModel) -> None:
    """Wait until the device of `model` has finished all queued work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
