"""Runs: an engine and its executor for a call, newly made or from the pool of the target.

Temperatures, seeds, ends of text and the like are data in buffers, so that one compiled or captured step serves all
calls with the same batch, tree, capacity and drafter.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..proposal import Drafter, DraftRequest, DraftSampling
from ..sampling import Sampler
from ..state import DecodeState
from ..step import Engine
from ..target.protocol import Target
from ..target.slots import SlotModel
from ..tree import DynamicShape, TreeShape
from ..verify import draft_sampling, walks
from .compile_times import patience, paying_tokens, step_key
from .executors import EXECUTORS, CompiledLater, Executor, choose
from .pool import EnginePool, KeptRun, forget, modules_of, pool_of, state_of, target_state
from .regions import distinct_layers

# Bytes in float32. The scores of trees with more are computed along the accepted path only: on a CPU that is quicker
# from some 50 nodes of a vocabulary of 152,000 tokens on, as the LM head's time grows with the rows from 8 on.
MOST_SCORES = 1 << 25


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What an engine is made for, apart from target and drafter; equal specs can share an engine. In the spec of a call
    `executor` may be "auto", and `capacity` and `eos` are the least needed; `settled` gives the spec to make."""

    shape: TreeShape | DynamicShape
    rule: str
    executor: str
    batch: int
    capacity: int  # of one row: the text, the tree behind it, and the padding slot
    eos: int  # how many end-of-text ids
    keep_scores: bool
    sampling: tuple  # the sampler's signature
    predicted: int = 0  # tokens that a row may copy from, besides its text
    fixed_capacity: bool = False  # whether all calls have this one, so that engines need not do for others too

    def settled(self, executor: str) -> "RunSpec":
        """The spec with `executor`, and with capacity and number of end-of-text ids rounded up for it."""
        eos = max(8, 1 << max(self.eos - 1, 0).bit_length())
        capacity = in_whole_64s(self.capacity) if self.fixed_capacity else settled_capacity(self.capacity, executor)
        return replace(self, executor=executor, capacity=capacity, eos=eos)


def settled_capacity(needed: int, executor: str) -> int:
    """`needed` slots rounded up: to a multiple of 64 for eager steps, to a power of two where every size has to be
    compiled or captured."""
    return in_whole_64s(needed) if executor == "eager" else max(256, 1 << (needed - 1).bit_length())


def in_whole_64s(needed: int) -> int:
    return -(-needed // 64) * 64


_making = threading.RLock()  # one step is compiled or captured at a time


@contextlib.contextmanager
def open_run(
    model: PreTrainedModel, drafter: Drafter, asked: RunSpec, sampler: Sampler, new_tokens: int
) -> Iterator[Executor]:
    """Yields the executor of an engine for a run of `new_tokens` tokens in total.

    The run is eager where the kept engine is in use (by another thread or an outer call), and where "auto" chose an
    executor that fails. Raises ValueError for a drafter of another vocabulary or a named executor
    that cannot run."""
    target_vocab, draft_vocab = model.config.get_text_config().vocab_size, drafter.traits.vocab_size
    if draft_vocab not in (None, target_vocab):
        raise ValueError(
            f"drafter {drafter.name!r} has a vocabulary of {draft_vocab} tokens and the target one of {target_vocab}; "
            "use a drafter made for this target's tokenizer"
        )
    pool = pool_of(model)
    target = target_state(model) if pool.runs and asked.executor != "eager" else None
    auto, settled = asked.executor == "auto", asked.settled("compiled")
    compiled_before = auto and bool(pool.alike(settled, target, drafter))
    key = step_key([model, *modules_of(drafter)], settled.batch, settled.capacity) if auto else ""
    paying = paying_tokens(key) if auto else None
    name = choose(asked.executor, model, new_tokens, sampler.capturable, compiled_before, paying)
    if auto and name == "compiled" and many_scores(model, asked.batch, len(asked.shape), asked.rule, sampler.do_sample):
        name = "eager"  # whose steps need not hold them
    if auto and name == "compiled" and not compiled_before:
        with _begun_eagerly(pool, model, drafter, settled, sampler, key) as begun:
            yield begun
        return
    run = None if name == "eager" else _kept_or_made(pool, target, model, drafter, asked, sampler, name)
    if run is None:
        engine = make_engine(model, drafter, asked.settled("eager"), sampler)
        yield EXECUTORS["eager"](engine)
        return
    try:
        yield run.executor
    finally:
        pool.give_back(run)


@contextlib.contextmanager
def _begun_eagerly(
    pool: EnginePool, model: PreTrainedModel, drafter: Drafter, spec: RunSpec, sampler: Sampler, key: str
) -> Iterator[Executor]:
    """A run that begins eagerly and compiles if it takes long; the compiled run is then kept in the pool. `key` is
    what the times of its steps are kept by."""
    engine = make_engine(model, drafter, spec, sampler)
    executor = CompiledLater(engine, patience(key, distinct_layers(engine.packable)))
    try:
        yield executor
    finally:
        executor.keep_times(key)
        if executor.compiled is not None:
            run = _kept_run(model, drafter, engine, spec, executor.compiled)
            pool.give_back(run)
            pool.add(run)


def _kept_or_made(
    pool: EnginePool,
    target: tuple[int, int] | None,
    model: PreTrainedModel,
    drafter: Drafter,
    asked: RunSpec,
    sampler: Sampler,
    name: str,
) -> KeptRun | None:
    """A run from the pool, made now if there is none, and marked as in use; None where the call has to be eager.
    `target` is the state of the model, None where the pool is empty."""
    spec = asked.settled(name)
    if run := pool.take(spec, target, model, drafter):
        try:
            run.executor.packing.refresh()  # again, where weights have changed
        except BaseException:
            pool.give_back(run)
            raise
        return run
    if pool.alike(spec, target, drafter):  # in use
        return None
    with _making:
        if run := pool.take(spec, target_state(model), model, drafter):  # made by another thread in the meantime
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


def _made(model: PreTrainedModel, drafter: Drafter, spec: RunSpec, sampler: Sampler) -> KeptRun:
    engine = make_engine(model, drafter, spec, sampler)
    return _kept_run(model, drafter, engine, spec, EXECUTORS[spec.executor](engine))


def _kept_run(model: PreTrainedModel, drafter: Drafter, engine: Engine, spec: RunSpec, executor: Executor) -> KeptRun:
    """To be called after the executor is made, because a first forward may set attributes of the models."""
    return KeptRun(spec, drafter, engine, executor, target_state(model), state_of(drafter), in_use=True)


def many_scores(model: PreTrainedModel, batch: int, nodes: int, rule: str, sampling: bool) -> bool:
    """Whether the scores of `batch` trees of so many nodes are too many to exist together, and need not."""
    return walks(rule, sampling) and nodes > most_scored(model, batch)


def most_scored(model: PreTrainedModel, batch: int = 1) -> int:
    """The most nodes of each of `batch` trees whose scores exist together; one at least."""
    return max(1, MOST_SCORES // (4 * batch * model.config.get_text_config().vocab_size))


def make_engine(model: PreTrainedModel, drafter: Drafter, spec: RunSpec, sampler: Sampler) -> Engine:
    """An engine for `spec` with fresh buffers."""
    sizes = spec.batch, len(spec.shape), spec.rule, sampler.do_sample
    unscored = spec.executor == "eager" and many_scores(model, *sizes)
    target = SlotModel(model, spec.batch, spec.capacity, drafter.traits.taps, unscored=unscored)
    drawing = draft_sampling(spec.rule, sampler.do_sample)
    sizes_of_rows = spec.eos, spec.keep_scores, spec.predicted
    return open_engine(target, drafter, spec.shape, sampler, drawing, spec.rule, *sizes_of_rows)


def open_engine(
    target: Target,
    drafter: Drafter,
    shape: TreeShape | DynamicShape,
    sampler: Sampler,
    drawing: DraftSampling,
    rule: str,
    eos: int,
    keep_scores: bool = False,
    predicted: int = 0,
) -> Engine:
    """An engine with fresh buffers for as many rows as the target has; every row is done until a text is admitted.

    `eos` is how many end-of-text ids a row may have, `predicted` how many tokens to copy from besides its text.
    Raises ValueError for a shape that the drafter cannot fill."""
    if isinstance(shape, DynamicShape) and not drafter.traits.fills_dynamic:
        raise ValueError(
            f"drafter {drafter.name!r} fills fixed trees only; use a tree like '4x2x1', or a draft model or EAGLE"
        )
    traits = target.traits
    sizes = traits.batch, traits.capacity
    request = DraftRequest(
        *sizes, traits.vocab_size, traits.device, shape, drawing, target.model, may_wait=not traits.static
    )
    return Engine(
        state=DecodeState.empty(*sizes, eos, traits.device, predicted),
        target=target,
        session=drafter.open(request),
        sampler=sampler,
        rule=rule,
        keep_scores=keep_scores,
    )


def keep(model: PreTrainedModel, engines: int) -> None:
    """Let the pool of `model` keep up to `engines` runs, if that is more than usual."""
    pool_of(model).most = engines


def reset(model: PreTrainedModel) -> None:
    """Free the engines kept for `model`, their caches and their compiled steps."""
    forget(model)
    torch._dynamo.reset()
