"""Engines and their executors: made for a call, and kept where making them is expensive.

A compiled or captured step is bound to its buffers, so its engine stays in the pool of its target and takes the next
text of the same batch, tree, capacity and drafter; temperatures, seeds, ends of text and the like are data. It is given
out only while nobody uses it, and only to a call whose target and drafter are in the state that it was made for
(module_state.py). A pool goes with its model: an engine at rest does not hold on to its target.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import psutil
import torch

from .executors import EXECUTORS, PATIENCE, CompiledLater, choose
from .hidden import lm_head
from .module_state import addresses, fingerprint, structure
from .packing import pack
from .proposal import DraftRequest, DraftSampling, parts_of
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .step import Engine
from .tree import TreeShape
from .verify import draft_sampling

KEPT = 8  # engines per model
KEPT_SHARE = 0.25  # of the device's memory that their caches may take


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What an engine is made for, beside target and drafter; equal specs can share one. As asked for, `executor` may be
    "auto" and `capacity` and `eos` what is needed; as kept, they are settled."""

    shape: TreeShape
    rule: str
    executor: str
    batch: int
    capacity: int  # of one row: the text, the tree behind it, and the padding slot
    eos: int  # how many end-of-text ids
    keep_scores: bool
    sampling: tuple  # the sampler's signature

    def settled(self, executor: str) -> "RunSpec":
        """With `executor`, and the slots and end-of-text ids that it takes."""
        eos = max(8, 1 << max(self.eos - 1, 0).bit_length())
        return replace(self, executor=executor, capacity=settled_capacity(self.capacity, executor), eos=eos)


def settled_capacity(needed: int, executor: str) -> int:
    """Slots for `needed` ones: in whole 64s where a size costs nothing, in powers of two where each size is compiled or
    captured."""
    return -(-needed // 64) * 64 if executor == "eager" else max(256, 1 << (needed - 1).bit_length())


@dataclass(slots=True, eq=False)
class KeptRun:
    """An engine with its executor, and the state of the models that it is bound to."""

    spec: RunSpec
    drafter: object
    engine: Engine
    executor: object
    target_state: tuple[int, int]  # structure and addresses
    drafter_state: tuple
    in_use: bool = False

    @property
    def nbytes(self) -> int:
        return self.engine.target.cache.nbytes + self.engine.session.nbytes


@dataclass(slots=True, eq=False)
class EnginePool:
    """The kept runs of one target, the one used last at the end."""

    most: int = 0  # how many to keep, where a caller wants more than usual
    runs: list[KeptRun] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, spec: RunSpec, model, drafter) -> KeptRun | None:
        """The kept run for `spec`, marked as in use; None where there is none. Forgets runs whose target's weights
        lie elsewhere now."""
        with self.lock:
            if not self.runs:
                return None
            target = structure(model), addresses(model)
            self.runs = [run for run in self.runs if run.in_use or run.target_state[1] == target[1]]
            for run in reversed(self.runs):
                if run.spec == spec and run.target_state == target and self._drafts_alike(run, drafter):
                    if run.in_use:
                        continue
                    self.runs.remove(run)
                    self.runs.append(run)
                    run.in_use, run.engine.target.model = True, model
                    return run
            return None

    def has(self, spec: RunSpec, model, drafter) -> bool:
        """Whether a run for `spec` is kept, in use or not."""
        with self.lock:
            target = (structure(model), addresses(model)) if self.runs else None
            return any(
                run.spec == spec and run.target_state == target and self._drafts_alike(run, drafter)
                for run in self.runs
            )

    def _drafts_alike(self, run: KeptRun, drafter) -> bool:
        """Whether `run` drafts what `drafter` would: it is bound to that very object, or to one of equal weights."""
        if _state_of(run.drafter) != run.drafter_state:
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
        """Forget the runs used longest ago, as far as nobody uses them, until count and memory are within bounds."""
        most, share = max(KEPT, self.most), KEPT_SHARE * _device_bytes(device)
        for run in list(self.runs):
            if len(self.runs) <= most and sum(kept.nbytes for kept in self.runs) <= share:
                return
            if not run.in_use:
                self.runs.remove(run)


_pools: "WeakKeyDictionary[torch.nn.Module, EnginePool]" = WeakKeyDictionary()
_making = threading.RLock()  # one step is compiled or captured at a time


def pool_of(model) -> EnginePool:
    """The pool of a target, made on first use."""
    return _pools.setdefault(model, EnginePool())


@contextlib.contextmanager
def open_run(model, drafter, asked: RunSpec, sampler: Sampler, new_tokens: int) -> Iterator[tuple[Engine, object]]:
    """An engine and its executor for a run of `new_tokens` tokens in all, for the time of the block.

    Where the kept engine is in use (by another thread, or by the call that this one is inside of), or "auto" chose an
    executor that fails, the run is eager. Raises ValueError for a drafter of another vocabulary or a named executor
    that cannot run."""
    mine, theirs = model.config.get_text_config().vocab_size, drafter.traits.vocab_size
    if theirs not in (None, mine):
        raise ValueError(
            f"drafter {drafter.name!r} has a vocabulary of {theirs} tokens and the target one of {mine}; use a drafter "
            "made for this target's tokenizer"
        )
    pool = pool_of(model)
    compiled_before = asked.executor == "auto" and pool.has(asked.settled("compiled"), model, drafter)
    name = choose(asked.executor, model.device, new_tokens, sampler.capturable, compiled_before)
    if asked.executor == "auto" and name == "compiled" and not compiled_before:
        with _begun_eagerly(pool, model, drafter, asked.settled(name), sampler) as begun:
            yield begun
        return
    run = None if name == "eager" else _kept_or_made(pool, model, drafter, asked, sampler, name)
    if run is None:
        engine = make_engine(model, drafter, asked.settled("eager"), sampler)
        yield engine, EXECUTORS["eager"](engine)
        return
    try:
        yield run.engine, run.executor
    finally:
        pool.give_back(run)


@contextlib.contextmanager
def _begun_eagerly(pool: EnginePool, model, drafter, spec: RunSpec, sampler: Sampler):
    """A run that compiles only if it goes on for long; what it has compiled is kept."""
    engine = make_engine(model, drafter, spec, sampler)
    executor = CompiledLater(engine, PATIENCE)
    try:
        yield engine, executor
    finally:
        if executor.compiled is not None:
            run = _kept_run(model, drafter, engine, spec, executor.compiled)
            pool.give_back(run)
            pool.add(run)


def _kept_or_made(pool: EnginePool, model, drafter, asked: RunSpec, sampler: Sampler, name: str) -> KeptRun | None:
    """A run in the pool, marked as in use; None where the call has to be eager."""
    spec = asked.settled(name)
    if run := pool.take(spec, model, drafter):
        pack(run.engine.packable)  # again, where weights have changed
        return run
    if pool.has(spec, model, drafter):
        return None
    with _making:
        if run := pool.take(spec, model, drafter):  # made by another thread in the meantime
            return run
        try:
            run = _made(model, drafter, spec, sampler)
        except ValueError as error:
            if asked.executor != "auto":
                raise
            print(f"{error} (which runs now)", file=sys.stderr)
            return None
    pool.add(run)
    return run


def _made(model, drafter, spec: RunSpec, sampler: Sampler) -> KeptRun:
    engine = make_engine(model, drafter, spec, sampler)
    return _kept_run(model, drafter, engine, spec, EXECUTORS[spec.executor](engine))


def _kept_run(model, drafter, engine: Engine, spec: RunSpec, executor) -> KeptRun:
    """To be called once the executor is made, when whatever a first forward sets in the models is set."""
    target = structure(model), addresses(model)
    return KeptRun(spec, drafter, engine, executor, target, _state_of(drafter), in_use=True)


def modules_of(drafter) -> list[torch.nn.Module]:
    """The modules that a drafter, or each of the drafters side by side, holds."""
    return [module for part in parts_of(drafter) for module in part.traits.modules]


def _state_of(drafter) -> tuple:
    return tuple((structure(module), addresses(module)) for module in modules_of(drafter))


def _identity(drafter) -> tuple:
    """Equal for drafters that draft alike: of one kind, with the same weights and the same known tokens."""
    alike = []
    for part in parts_of(drafter):
        known, modules = part.traits.vocabulary, part.traits.modules
        tokens = None if known is None else tuple(known.tolist())
        alike.append((type(part), tokens, fingerprint(modules)) if modules else part)
    return tuple(alike)


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def make_engine(model, drafter, spec: RunSpec, sampler: Sampler) -> Engine:
    """An engine for `spec` with fresh buffers."""
    drawing = draft_sampling(spec.rule, sampler.do_sample)
    what = drafter, spec.shape, sampler, drawing, spec.rule
    return open_engine(model, *what, spec.batch, spec.capacity, spec.eos, spec.keep_scores)


def open_engine(
    model,
    drafter,
    shape: TreeShape,
    sampler: Sampler,
    drawing: DraftSampling,
    rule: str,
    batch: int,
    capacity: int,
    eos: int,
    keep_scores: bool = False,
) -> Engine:
    """The parts of a run with their buffers; every row is done until a text is loaded."""
    device, hidden = model.device, None
    reads_hidden = drafter.traits.reads_hidden
    if reads_hidden:
        hidden = torch.zeros(batch, lm_head(model).weight.shape[1], dtype=model.dtype, device=device)
    vocab = model.config.get_text_config().vocab_size
    return Engine(
        state=DecodeState.empty(batch, capacity, eos, device, hidden),
        target=SlotModel(model, capacity, reads_hidden),
        session=drafter.open(DraftRequest(batch, capacity, vocab, device, shape, drawing, model)),
        sampler=sampler,
        rule=rule,
        keep_scores=keep_scores,
    )


def keep(model, engines: int) -> None:
    """Let `model` keep as many, where that is more than usual, for a caller that comes back to all of them."""
    pool_of(model).most = engines


def reset(model) -> None:
    """Free the engines kept for `model`, their caches and their compiled steps."""
    _pools.pop(model, None)
    torch._dynamo.reset()
