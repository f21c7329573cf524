"""Executors: ways to run the step function on an engine's persistent buffers.

    eager                plain Python, as it is written
    compiled             torch.compile, one graph, no recompiles, cached on disk between processes
    cuda_graph_eager     the eager step captured once as a CUDA graph and replayed
    cuda_graph_compiled  the compiled step captured, which replays Triton's fused kernels without any Python
    cuda_graph           the better of these two on this GPU, according to `paceline check` (capture_choice.py)

`CompiledLater` begins eagerly and compiles when a text has become long. The host reads the results of captured steps
one step late, so that the device never waits for it. All executors but eager are bound to the buffers of an engine; an
engine is therefore kept with its executor and used again for the next call of the same shapes. Knows nothing of what a
step does.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakSet

import torch

from ..console import waiting
from ..kernels.linears import Packing
from ..step import Engine, StepResult, step
from ..stream.streamer import streamer_of
from ..trace import COMPILING
from .capture_choice import compiled_capture_is_better
from .compile_times import expected_compile, keep, step_key
from .inductor import compiled, prepare
from .regions import distinct_layers, layers_as_regions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_RUN = 8192  # new tokens in a call from which compiling on a CPU usually pays, where no times are known
ENOUGH = 8  # steps of each kind, for their times to be kept

Step = Callable[[Engine, Callable[[str], None]], Any]  # returns a `StepResult`; other work may return anything


def _silent(phase: str) -> None:
    """Takes the place of `mark` where the phases of a step cannot be timed one by one."""


class Executor(Protocol):
    """Runs the steps of one engine."""

    @property
    def engine(self) -> Engine:
        """The engine whose steps it runs."""

    @property
    def packing(self) -> Packing:
        """The packed weights of the engine's models, with which its steps and its reading of prompts compute."""

    @property
    def lag(self) -> int:
        """How many steps late the host reads."""

    @property
    def making_seconds(self) -> float:
        """Seconds that compiling and capturing took."""

    def run(self, mark: Callable[[str], None]) -> StepResult:
        """Run a step; `mark` is called at the end of each of its phases, or once with "step"."""


class Eager:
    """Runs the step (or other `work` on an engine) as plain Python, timed phase by phase."""

    lag = 0
    making_seconds = 0.0

    def __init__(self, engine: Engine, work: Step | None = None):
        self.engine, self.work, self.packing = engine, work or step, Packing(engine.packable)

    def run(self, mark: Callable[[str], None]) -> StepResult:
        with self.packing:
            return self.work(self.engine, mark)


class Compiled:
    """The step compiled to one graph for one engine. Compiling takes tens of seconds, less with a warm disk cache."""

    lag = 0

    def __init__(self, engine: Engine, work: Step | None = None):
        _check_static(engine, "compiled")
        prepare()
        self.engine, self.work, self.packing = engine, work or step, Packing(engine.packable)
        traits = engine.target.traits
        self.key, kinds = step_key(engine.packable, traits.batch, traits.capacity), distinct_layers(engine.packable)
        started = time.perf_counter()
        try:
            with waiting(f"compiling the step, about {expected_compile(self.key, kinds):.0f} s"), self.packing:
                engine.idle_step()  # allocates the caches, which must exist before the graph is traced
                self.step = self._layers_once() or self._compiled()
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # also a folder that cannot be written
            raise ValueError(_reason("compiled", error)) from error
        self.making_seconds = time.perf_counter() - started
        keep(self.key, compile=self.making_seconds, kinds=kinds)

    def _layers_once(self) -> Callable[[], StepResult] | None:
        """The step with each kind of repeated layer compiled once; None where torch cannot."""
        with layers_as_regions(self.engine.packable, self.engine.idle_step) as found:
            try:
                return self._compiled() if found else None
            except (RuntimeError, NotImplementedError, AssertionError):  # it ends in other errors than its own, too
                return None

    def _compiled(self) -> Callable[[], StepResult]:
        """The step, compiled in one piece and run once."""
        engine, work = self.engine, self.work
        traced = compiled(lambda: work(engine, _silent))
        traced()
        return traced

    def run(self, mark: Callable[[str], None]) -> StepResult:
        result = self.step()
        mark("step")
        return result


class CompiledLater:
    """Eager steps for `patience` seconds, then compiled ones, because it is not known beforehand how long a text
    becomes. `compiled` is None until then, and where compiling fails. The times of both are kept for later runs."""

    lag = 0
    making_seconds = 0.0  # of eager steps

    def __init__(self, engine: Engine, patience: float):
        self.engine, self.patience = engine, patience
        self.eager = Eager(engine)
        self.packing = self.eager.packing
        self.compiled: Compiled | None = None
        self.begun: float | None = time.perf_counter()  # None once it has tried to compile
        self.seconds: dict[str, list[float]] = {"eager": [], "compiled": []}  # of each step

    def run(self, mark: Callable[[str], None]) -> StepResult:
        if self.begun is not None and time.perf_counter() - self.begun >= self.patience:
            self.begun = None
            self._compile()
            mark(COMPILING)
        started = time.perf_counter()
        result = (self.compiled or self.eager).run(mark)
        self.seconds["eager" if self.compiled is None else "compiled"].append(time.perf_counter() - started)
        return result

    def keep_times(self, key: str) -> None:
        """Keep the median times of both kinds of steps, once there are enough of both to compare."""
        if min(map(len, self.seconds.values())) >= ENOUGH:
            keep(key, **{name: statistics.median(seconds) for name, seconds in self.seconds.items()})

    def _compile(self) -> None:
        """Compile in the middle of a run. Tracing runs steps with every row marked as done, so that no text changes."""
        state = self.engine.state
        done = state.done.clone()
        try:
            self.compiled = Compiled(self.engine)
        except ValueError as error:
            print(f"{error} (which runs now)", file=sys.stderr)
        state.done.copy_(done)


class CudaGraph:
    """The eager step of one engine, captured as a CUDA graph. All captures on a device share one memory pool, because
    they never run at the same time and never read one another's results."""

    lag = 1
    name = "cuda_graph_eager"
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    living: ClassVar[dict[torch.device, "WeakSet[torch.cuda.CUDAGraph]"]] = {}

    def __init__(self, engine: Engine, work: Step | None = None):
        _check_static(engine, self.name)
        self.engine, self.work, self.device = engine, work or step, engine.state.tokens.device
        self.packing = Packing(())  # which is for CPUs
        started = time.perf_counter()
        with torch.cuda.device(self.device):
            try:
                self._capture(engine)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(_reason(self.name, error)) from error
        self.making_seconds = time.perf_counter() - started

    def _capture(self, engine: Engine) -> None:
        if self.device not in self.streams:  # torch's default capture stream belongs to the device of the first capture
            self.streams[self.device] = torch.cuda.Stream()
        side, graphs = self.streams[self.device], self.living.setdefault(self.device, WeakSet())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            engine.idle_step()  # allocates the caches
            for _ in range(3):  # libraries choose their kernels and workspaces now
                self.work(engine, _silent)
        torch.cuda.current_stream().wait_stream(side)
        pool = next((graph.pool() for graph in graphs), None)  # a pool ends with the last of its graphs
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.result = self.work(engine, _silent)
        graphs.add(self.graph)

    def run(self, mark: Callable[[str], None]) -> StepResult:
        self.graph.replay()
        mark("step")
        return self.result


class CompiledCudaGraph(CudaGraph):
    """The compiled step of one engine, captured as a CUDA graph."""

    name = "cuda_graph_compiled"

    def __init__(self, engine: Engine, work: Step | None = None):
        compiled = Compiled(engine, work)
        super().__init__(engine, lambda engine, mark: compiled.step())
        self.making_seconds += compiled.making_seconds


def _check_static(engine: Engine, name: str) -> None:
    if not engine.target.traits.static:
        raise ValueError(_waits(name))


def _waits(name: str) -> str:
    return f"executor={name!r} cannot take this step, in which the target waits for the host; use 'eager'"


def _reason(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return (
        f"executor={name!r} cannot take this step ({type(error).__name__}: {first[0] if first else ''}); "
        "use executor='eager'"
    )


def choose(
    name: str,
    model: "PreTrainedModel",
    new_tokens: int,
    capturable: bool,
    compiled_before: bool,
    paying: float | None = None,
) -> str:
    """The name in `EXECUTORS` that `name` ("auto" and "cuda_graph" too) stands for, for this `model`; `paying` is the
    number of `new_tokens` from which compiling may pay, `LONG_RUN` if not given. Raises ValueError, with an
    alternative, for an executor that cannot run."""
    device, streamed = model.device, streamer_of(model) is not None
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or device.type == "cuda"
    if name == "auto":
        if streamed or not capturable:
            return "eager"
        if device.type == "cuda":
            return choose("cuda_graph", model, new_tokens, capturable, compiled_before)
        long = has_compiler and new_tokens >= (LONG_RUN if paying is None else paying)
        return "compiled" if compiled_before or long else "eager"
    if streamed and name != "eager":
        raise ValueError(_waits(name))
    if name.startswith("cuda_graph") and device.type != "cuda":
        raise ValueError(f"executor={name!r} needs CUDA and the model is on {device}; use 'compiled' or 'eager'")
    if name == "compiled" and not has_compiler:
        raise ValueError("executor='compiled' needs a C++ compiler (g++ or clang++) and there is none; use 'eager'")
    if name != "eager" and not capturable:
        raise ValueError(
            f"executor={name!r} cannot run logits processors that look at the history or at Python state; use 'eager'"
        )
    if name == "cuda_graph":
        return CompiledCudaGraph.name if compiled_capture_is_better(device) else CudaGraph.name
    return name


EXECUTORS: dict[str, type[Eager | Compiled | CudaGraph]] = {
    "eager": Eager,
    "compiled": Compiled,
    CudaGraph.name: CudaGraph,
    CompiledCudaGraph.name: CompiledCudaGraph,
}


def executor_names() -> tuple[str, ...]:
    """What `executor` may be: a line in the table, or a choice among them."""
    return ("auto", "cuda_graph", *EXECUTORS)
