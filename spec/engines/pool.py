"""The pool of a target: runs (an engine with its executor) that are kept because making them is expensive.

A kept run is used by one call at a time, and only by calls whose target and drafter are in the state that it was made
for (module_state.py); a drafter of the same kind with the same weights will do. A pool is freed with its model: an
engine that is not in use holds no reference to it. Knows nothing of how runs are made.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import psutil
import torch

from ..proposal import Drafter, parts_of
from ..step import Engine
from ..target.taps import put_taps
from .module_state import addresses, fingerprint, structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .executors import Executor
    from .runs import RunSpec

KEPT = 8  # engines per model
KEPT_SHARE = 0.25  # of the device's memory that their caches may take


@dataclass(slots=True, eq=False)
class KeptRun:
    """An engine with its executor, and the state of the models for which it was made."""

    spec: "RunSpec"
    drafter: Drafter
    engine: Engine
    executor: "Executor"
    target_state: tuple[int, int]  # structure and addresses
    drafter_state: tuple[tuple[int, int], ...]
    in_use: bool = False

    @property
    def nbytes(self) -> int:
        return self.engine.nbytes

    def takes(self, spec: "RunSpec") -> bool:
        """Whether it is a run for `spec`, maybe with more slots than that asks for: a step costs little more with twice
        the slots, while making one for fewer slots takes seconds."""
        slots = self.spec.capacity
        return spec.capacity <= slots <= 2 * spec.capacity and replace(spec, capacity=slots) == self.spec

    def wake(self, model: "PreTrainedModel") -> None:
        """Give the engine its target's model back, to which it has no reference while it is not in use."""
        self.engine.target.model = model
        put_taps(model, self.engine.target.traits.taps)  # should somebody have taken them off


@dataclass(slots=True, eq=False)
class EnginePool:
    """The kept runs of one target, the most recently used at the end."""

    most: int = 0  # how many to keep, where a caller wants more than usual
    runs: list[KeptRun] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def alike(self, spec: "RunSpec", target: tuple[int, int] | None, drafter: Drafter) -> list[KeptRun]:
        """The kept runs that can take `spec`, in use or not: of its capacity or up to twice that, the smallest and then
        the most recently used first."""
        with self.lock:
            runs = [run for run in reversed(self.runs) if run.takes(spec) and run.target_state == target]
            runs.sort(key=lambda run: run.spec.capacity)
            return [run for run in runs if self._drafts_alike(run, drafter)]

    def take(
        self, spec: "RunSpec", target: tuple[int, int] | None, model: "PreTrainedModel", drafter: Drafter
    ) -> KeptRun | None:
        """A kept run for `spec` that is free, which is marked as in use; None where there is none. Drops runs whose
        target's weights have moved to other addresses."""
        if target is None:
            return None
        with self.lock:
            self.runs = [run for run in self.runs if run.in_use or run.target_state[1] == target[1]]
            run = next((run for run in self.alike(spec, target, drafter) if not run.in_use), None)
            if run is not None:
                self.runs.remove(run)
                self.runs.append(run)
                run.in_use = True
                run.wake(model)
            return run

    def _drafts_alike(self, run: KeptRun, drafter: Drafter) -> bool:
        """Whether `run` drafts as `drafter` would: it was made for the same object, or one with equal weights."""
        if state_of(run.drafter) != run.drafter_state:
            return False
        if run.drafter is drafter or run.drafter == drafter:
            return True
        return bool(modules_of(drafter)) and _identity(drafter) == _identity(run.drafter)

    def add(self, run: KeptRun) -> None:
        with self.lock:
            self.runs.append(run)
            self._shrink(run.engine.state.tokens.device)

    def give_back(self, run: KeptRun) -> None:
        with self.lock:
            run.in_use, run.engine.target.model = False, None

    def _shrink(self, device: torch.device) -> None:
        """Drop the least recently used runs that are free, until count and memory are within bounds."""
        most, share = max(KEPT, self.most), KEPT_SHARE * _device_bytes(device)
        for run in list(self.runs):
            if len(self.runs) <= most and sum(kept.nbytes for kept in self.runs) <= share:
                return
            if not run.in_use:
                self.runs.remove(run)


_pools: "WeakKeyDictionary[torch.nn.Module, EnginePool]" = WeakKeyDictionary()


def pool_of(model: "PreTrainedModel") -> EnginePool:
    """The pool of a target, made on first use."""
    return _pools.setdefault(model, EnginePool())


def target_state(model: "PreTrainedModel") -> tuple[int, int]:
    """The state of a target that a kept run depends on; takes a few milliseconds."""
    return structure(model), addresses(model)


def forget(model: "PreTrainedModel") -> None:
    """Drop all runs kept for `model`."""
    _pools.pop(model, None)


def modules_of(drafter: Drafter) -> list[torch.nn.Module]:
    """The modules of a drafter, or of all drafters that it combines."""
    return [module for part in parts_of(drafter) for module in part.traits.modules]


def state_of(drafter: Drafter) -> tuple[tuple[int, int], ...]:
    return tuple((structure(module), addresses(module)) for module in modules_of(drafter))


def _identity(drafter: Drafter) -> tuple:
    """Equal for drafters of one kind with the same weights and known tokens, which draft the same."""
    alike = []
    for part in parts_of(drafter):
        maps, modules = (part.traits.vocabulary, part.traits.reads), part.traits.modules
        tokens = tuple(None if ids is None else tuple(ids.tolist()) for ids in maps)
        alike.append((type(part), tokens, fingerprint(modules)) if modules else part)
    return tuple(alike)


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
