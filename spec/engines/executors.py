"""Ways to run the one step function over one record of persistent buffers.

    eager                as it is written
    compiled             torch.compile, one graph, no recompiles, cached on disk between processes
    cuda_graph_eager     the eager step captured once as a CUDA graph and replayed
    cuda_graph_compiled  the compiled step captured, so that Triton's fused kernels are replayed without any Python
    cuda_graph           the better of these two on this GPU, as far as `paceline check` has shown (captures.py)

Results of captured steps are read one step late, so nothing waits for the host. All but eager bind to the buffers
of an engine, so an engine with its executor is kept and filled again with the next text of the same shape. Knows
nothing of what a step does.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch

from ..console import waiting
from ..files import cache_folder
from ..kernels.linears import pack, packed_linears
from ..step import Engine, StepResult, step
from .captures import compiled_capture_is_better

LONG_RUN = 8192  # new tokens in one call from which compiling on a CPU pays for itself, roughly
PATIENCE = 30.0  # seconds of eager steps in such a call before it compiles: the text may end much earlier


Step = Callable[[Engine, Callable[[str], None]], Any]  # gives a `StepResult`; other work on an engine, what it likes


def _silent(phase: str) -> None:
    """The marks of a step that cannot be interrupted to look at the clock."""


class Executor(Protocol):
    """Runs the steps of one engine."""

    @property
    def engine(self) -> Engine:
        """Whose steps they are."""

    @property
    def lag(self) -> int:
        """How many steps late the host reads."""

    @property
    def making_seconds(self) -> float:
        """What compiling and capturing took."""

    def run(self, mark: Callable[[str], None]) -> StepResult:
        """A step; `mark` hears of its phases, or of the step as a whole, as each ends."""


class Eager:
    """The step (or other `work` on an engine) as it is written, timed phase by phase."""

    lag = 0
    making_seconds = 0.0

    def __init__(self, engine: Engine, work: Step | None = None):
        self.engine, self.work = engine, work or step

    def run(self, mark: Callable[[str], None]) -> StepResult:
        return self.work(self.engine, mark)


class Compiled:
    """One graph for one engine. Compiling takes tens of seconds a shape, less when the disk cache has it.

    On a CPU it reads a packed copy of the weights."""

    lag = 0

    def __init__(self, engine: Engine, work: Step | None = None):
        _check_static(engine, "compiled")
        _keep_compiled_code()
        self.engine, work = engine, work or step
        # Buffers, shapes and modules of an engine never change, so there is nothing to guard against.
        self.step = torch.compile(  # type: ignore[call-overload]  # torch's overloads lack isolate_recompiles
            lambda: work(engine, _silent),
            fullgraph=True,
            dynamic=False,
            isolate_recompiles=True,
            options={
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                "size_asserts": False,  # packed weights have no strides to assert
                # Rounding where eager code does, whatever is fused: a step of one node has the numbers of one of many.
                "emulate_precision_casts": True,
            },
        )
        started = time.perf_counter()
        try:
            with waiting("compiling the step"):
                engine.idle_step()  # allocates the caches, which must exist before the graph is traced
                pack(engine.packable)
                with packed_linears(engine.packable):
                    self.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(_reason("compiled", error)) from error
        self.making_seconds = time.perf_counter() - started

    def run(self, mark: Callable[[str], None]) -> StepResult:
        result = self.step()
        mark("step")
        return result


class CompiledLater:
    """Eager steps for `patience` seconds, and compiled ones from then on: nobody knows beforehand how long a text
    becomes. `compiled` is the executor of these, once it is there."""

    lag = 0
    making_seconds = 0.0  # of the steps that it begins with

    def __init__(self, engine: Engine, patience: float):
        self.engine, self.patience = engine, patience
        self.eager = Eager(engine)
        self.compiled: Compiled | None = None
        self.begun: float | None = time.perf_counter()  # None once it has tried to compile

    def run(self, mark: Callable[[str], None]) -> StepResult:
        if self.begun is not None and time.perf_counter() - self.begun >= self.patience:
            self.begun = None
            self._compile()
        return (self.compiled or self.eager).run(mark)

    def _compile(self) -> None:
        """In the middle of a run: tracing needs steps in which every row is done, which change no text."""
        state = self.engine.state
        done = state.done.clone()
        try:
            self.compiled = Compiled(self.engine)
        except ValueError as error:
            print(f"{error} (which runs now)", file=sys.stderr)
        state.done.copy_(done)


class CudaGraph:
    """One capture of the eager step for one engine; all captures on a device share one memory pool, as no two of them
    ever run at the same time and none reads what another left behind."""

    lag = 1
    name = "cuda_graph_eager"
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}
    living: ClassVar[dict[torch.device, "WeakSet[torch.cuda.CUDAGraph]"]] = {}

    def __init__(self, engine: Engine, work: Step | None = None):
        _check_static(engine, self.name)
        self.engine, self.work, self.device = engine, work or step, engine.state.tokens.device
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
        if self.device not in self.streams:  # torch's own default stream is of the device that was captured on first
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
    """One capture of the compiled step."""

    name = "cuda_graph_compiled"

    def __init__(self, engine: Engine, work: Step | None = None):
        compiled = Compiled(engine, work)
        super().__init__(engine, lambda engine, mark: compiled.step())
        self.making_seconds += compiled.making_seconds


def _keep_compiled_code() -> None:
    """Let the next process find the compiled code, where the cache can be written."""
    folder = cache_folder() / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # torch then uses a temporary folder
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _check_static(engine: Engine, name: str) -> None:
    if not engine.target.traits.static:
        raise ValueError(
            f"executor={name!r} cannot take this step, in which the target waits for the host; use 'eager'"
        )


def _reason(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return (
        f"executor={name!r} cannot take this step ({type(error).__name__}: {first[0] if first else ''}); "
        "use executor='eager'"
    )


def choose(name: str, device: torch.device, new_tokens: int, capturable: bool, compiled_before: bool) -> str:
    """The executor of `EXECUTORS` that `name` means here. Raises ValueError, naming one that can run, for one that
    cannot."""
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or device.type == "cuda"
    if name == "auto":
        if not capturable:
            return "eager"
        if device.type == "cuda":
            return choose("cuda_graph", device, new_tokens, capturable, compiled_before)
        return "compiled" if compiled_before or (has_compiler and new_tokens >= LONG_RUN) else "eager"
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
