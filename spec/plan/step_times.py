"""What steps cost on this device: t_target(n) and t_draft(d), measured in place.

Steps in which every row is done cost what real ones do (all shapes are static), so engines are timed idle, as if half
their slots held text, in turns, and medians are kept. Knows nothing of acceptance.
"""

import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engines.executors import EXECUTORS, Executor, Step
from ..engines.runs import open_engine
from ..proposal import Drafter, DraftRequest, DraftSampling, EmptySession, NoDrafter, Proposal
from ..sampling import Sampler
from ..state import DecodeState
from ..step import Engine, unpack_report
from ..target.slots import SlotModel
from ..trace import Trace
from ..tree import DynamicShape, TokenTree, TreeShape
from .trees import interpolate

IDLE_CAPACITY = 512  # slots of an engine that is timed; half of them hold text
Key = TypeVar("Key")


@dataclass(frozen=True)
class Curves:
    """Seconds of a step that verifies n nodes, drafting aside, and of each drafter's drafting d levels."""

    target: dict[int, float]
    drafts: tuple[dict[int, float], ...]


@dataclass(frozen=True, slots=True)
class Blank(NoDrafter):
    """A drafter that costs nothing: it repeats the root, as if drawn uniformly."""

    def open(self, request: DraftRequest) -> "BlankSession":
        flat = torch.zeros(1, 1, 1, device=request.device).expand(request.batch, len(request.shape), request.vocab_size)
        return BlankSession(TokenTree.of(request.fixed_shape, request.device), flat)


@dataclass(frozen=True, slots=True, eq=False)
class BlankSession(EmptySession):
    draft_logits: Tensor

    def propose(self, state: DecodeState) -> Proposal:
        tokens = state.roots().repeat(1, self.tree.size)
        return Proposal(tokens, self.tree, "without_replacement", "own", self.draft_logits)


def in_turns(
    model: PreTrainedModel, runners: Mapping[Key, Executor], repeats: int, warm_up: int = 3, limit: float = math.inf
) -> dict[Key, float]:
    """Median seconds of a run of each of `runners`, which take turns, after `warm_up` turns that do not count; no turn
    begins after `limit` seconds, but one counts in any case."""
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


def open_idle(
    model: PreTrainedModel,
    executor: str,
    drafter: Drafter,
    shape: TreeShape | DynamicShape,
    capacity: int = IDLE_CAPACITY,
    sampling: DraftSampling | None = None,
    forward_only: bool = False,
    batch: int = 1,
) -> Executor:
    """An executor over an engine of `batch` rows without a text, of whole steps or of their target forwards."""
    prompt, sampling = torch.ones(batch, 1, dtype=torch.long, device=model.device), sampling or DraftSampling()
    sampler = Sampler([], sampling.noise != "none", prompt, prompt[:, 0] * 0)
    rule = "residual" if sampling.noise == "own" else "match"
    with torch.no_grad():
        target = SlotModel(model, batch, capacity, drafter.traits.taps)
        engine = open_engine(target, drafter, shape, sampler, sampling, rule, eos=1)
        engine.state.lengths.fill_(capacity // 2)  # attention looks as far as there is text
        return EXECUTORS[executor](engine, _forward_alone(engine) if forward_only else None)


def _forward_alone(engine: Engine) -> Step:
    """The target forward of a step and nothing else; what it sees is drafted beforehand."""
    base, proposal = engine.state.lengths - 1, engine.session.propose(engine.state)
    return lambda engine, mark: engine.target.forward(proposal, base).logits


def measure(
    model: PreTrainedModel,
    drafters: Sequence[Drafter],
    executor: str,
    sizes: Sequence[int] = (1, 4, 8, 16, 32),
    depths: Sequence[int] = (1, 4, 8),
    repeats: int = 15,
    sampling: DraftSampling | None = None,
) -> Curves:
    """The curves for one target, executor and some drafters; a compiled executor compiles one step a point."""
    opened = functools.partial(open_idle, model, executor, sampling=sampling)
    runs: dict[int | tuple[int, int], Executor] = {}
    for size in sizes:
        runs[size] = opened(Blank() if size > 1 else NoDrafter(), TreeShape.chain(size - 1))
    drafts = [(place, depth) for place in range(len(drafters)) for depth in depths]
    for place, depth in drafts:
        runs[place, depth] = opened(drafters[place], TreeShape.chain(depth))
    seconds = in_turns(model, runs, repeats)
    target = {size: seconds[size] for size in sizes}
    for smaller, larger in itertools.pairwise(sizes):  # a larger step never costs less; noise may say so
        target[larger] = max(target[larger], target[smaller])
    beyond = {key: max(seconds[key] - interpolate(target, key[1] + 1), 0.0) for key in drafts}
    found = ({0: 0.0, **{depth: beyond[place, depth] for depth in depths}} for place in range(len(drafters)))
    return Curves(target, tuple(found))


def own_cost(
    model: PreTrainedModel, drafter: Drafter, executor: str, shape: TreeShape | DynamicShape, repeats: int = 40
) -> tuple[float, float]:
    """Median seconds of a whole step, drafting included, and of the target forward in it alone, in turns."""
    runs = {only: open_idle(model, executor, drafter, shape, forward_only=only) for only in (False, True)}
    seconds = in_turns(model, runs, repeats)
    return seconds[False], seconds[True]


def recording_cost(depth: int, steps: int = 64, repeats: int = 15) -> float:
    """Median seconds that the trace takes for one row of a step with a chain of `depth` tokens, all accepted: its part
    of the report read, the event made, and its line written with those of `steps` others when the call ends."""
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


def slot_bytes(model: PreTrainedModel) -> int:
    """Bytes of one slot of a row in the cache of `model`, over all layers."""
    runner = open_idle(model, "eager", NoDrafter(), TreeShape.chain(0), capacity=64)
    with torch.no_grad():
        runner.run(lambda phase: None)
    return runner.engine.target.nbytes // 64


def wait_for(model: PreTrainedModel) -> None:
    """Return once the device of `model` has done all that it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
