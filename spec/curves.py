"""What steps cost on this device: t_target(n) and t_draft(d), measured in place.

Steps in which every row is done cost what real ones do (all shapes are static), so engines are timed idle, in
turns, and medians are kept. Knows nothing of acceptance.
"""

import itertools
import statistics
import time
from dataclasses import dataclass

import torch

from .executors import EXECUTORS
from .planner import interpolate
from .proposal import DraftRequest, DraftSampling, EmptySession, NoDrafter, Proposal
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .step import Engine
from .tree import TokenTree, TreeShape


@dataclass(frozen=True)
class Curves:
    """Seconds of a step that verifies n nodes, drafting aside, and of drafting d levels."""

    target: dict[int, float]
    draft: dict[int, float]


@dataclass(frozen=True, slots=True)
class Blank(NoDrafter):
    """A drafter that costs nothing: it repeats the root, as if drawn uniformly."""

    def open(self, request: DraftRequest) -> "BlankSession":
        flat = torch.zeros(1, 1, 1, device=request.device).expand(request.batch, len(request.shape), request.vocab_size)
        return BlankSession(TokenTree.of(request.shape, request.device), flat)


@dataclass(frozen=True, slots=True, eq=False)
class BlankSession(EmptySession):
    draft_logits: torch.Tensor

    def propose(self, state: DecodeState) -> Proposal:
        tokens = state.roots().repeat(1, self.tree.size)
        return Proposal(tokens, self.tree, "without_replacement", "own", self.draft_logits)


def timed_steps(model, executor: str, runs: dict, repeats: int, capacity: int = 512, sampling=None) -> dict:
    """Median seconds of an idle step of each run: {key: (drafter, shape)} -> {key: seconds}, in turns."""
    steps = {key: open_idle(model, executor, *run, capacity, sampling) for key, run in runs.items()}
    seconds = {key: [] for key in runs}
    with torch.no_grad():
        for repeat in range(repeats + 3):
            for key, runner in steps.items():
                _wait(model)
                started = time.perf_counter()
                runner.run(lambda phase: None)
                _wait(model)
                if repeat >= 3:
                    seconds[key].append(time.perf_counter() - started)
    return {key: statistics.median(values) for key, values in seconds.items()}


@torch.no_grad()
def open_idle(model, executor: str, drafter, shape: TreeShape, capacity: int, sampling: DraftSampling | None = None):
    """An executor over an engine without a text."""
    prompt, sampling = torch.ones(1, 1, dtype=torch.long, device=model.device), sampling or DraftSampling()
    vocab = model.config.get_text_config().vocab_size
    request = DraftRequest(1, capacity, vocab, model.device, shape, sampling)
    engine = Engine(
        state=DecodeState.empty(1, capacity, 1, model.device),
        target=SlotModel(model, capacity),
        session=drafter.open(request),
        sampler=Sampler([], sampling.noise != "none", prompt, prompt[:, 0] * 0),
        rule="residual" if sampling.noise == "own" else "match",
    )
    return EXECUTORS[executor](engine)


def measure(
    model, drafter, executor: str, sizes=(1, 4, 8, 16, 32), depths=(1, 4, 8), repeats: int = 15, sampling=None
) -> Curves:
    """Both curves for one target, drafter and executor; a compiled executor compiles one step a point."""
    blanks = {("target", size): (Blank() if size > 1 else NoDrafter(), TreeShape.chain(size - 1)) for size in sizes}
    drafts = {("draft", depth): (drafter, TreeShape.chain(depth)) for depth in depths}
    seconds = timed_steps(model, executor, blanks | drafts, repeats, sampling=sampling)
    target = {size: seconds["target", size] for size in sizes}
    for smaller, larger in itertools.pairwise(sizes):  # a larger step never costs less; noise may say so
        target[larger] = max(target[larger], target[smaller])
    draft = {depth: max(seconds["draft", depth] - interpolate(target, depth + 1), 0.0) for depth in depths}
    return Curves(target, {0: 0.0, **draft})


def _wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
