"""Engines and their executors: made for a call, and kept where making them is expensive.

A compiled or captured step is bound to its buffers, so its engine stays with the model and takes the next
text of the same batch, tree, capacity, drafter and sampling. The last few are kept; they go with the model.
"""

import sys
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from .executors import EXECUTORS, choose
from .proposal import DraftRequest, DraftSampling
from .sampling import Sampler
from .slots import SlotModel
from .state import DecodeState
from .step import Engine
from .tree import TreeShape

KEPT = 8  # engines per model


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What an engine is made for; equal specs can share one. As asked for, `executor` may be "auto" and
    `capacity` the slots needed; as kept, both are settled."""

    drafter: object
    shape: TreeShape
    rule: str
    executor: str
    batch: int
    capacity: int  # of one row: the text, the tree behind it, and the padding slot
    eos: int  # how many end-of-text ids
    keep_scores: bool
    sampling: tuple  # the sampler's signature
    model: str  # its device, dtype and attention, which may change between calls

    def settled(self, executor: str) -> "RunSpec":
        """With `executor`, and slots in whole 64s where a size costs nothing, in powers of two where each
        size is compiled or captured."""
        captured = max(256, 1 << (self.capacity - 1).bit_length())
        capacity = -(-self.capacity // 64) * 64 if executor == "eager" else captured
        return replace(self, executor=executor, capacity=capacity)


def open_run(model, asked: RunSpec, sampler: Sampler, new_tokens: int) -> tuple[Engine, object]:
    """An engine and its executor for a run of `new_tokens` tokens in all.

    Where "auto" chose an executor that fails, eager takes its place with a line that says so. Raises
    ValueError for a drafter of another vocabulary or a named executor that cannot run."""
    vocab = model.config.get_text_config().vocab_size
    if asked.drafter.vocab_size not in (None, vocab):
        raise ValueError(
            f"drafter {asked.drafter.name!r} has a vocabulary of {asked.drafter.vocab_size} tokens and the target one "
            f"of {vocab}; use a drafter made for this target's tokenizer"
        )
    kept: OrderedDict = model.__dict__.setdefault("_paceline_runs", OrderedDict())
    compiled_before = asked.settled("compiled") in kept
    name = choose(asked.executor, model.device, new_tokens, sampler.capturable, compiled_before)
    spec = asked.settled(name)
    if name != "eager" and spec in kept:
        kept.move_to_end(spec)
        return kept[spec]
    try:
        run = _run(model, spec, sampler)
    except ValueError as error:
        if asked.executor != "auto" or name == "eager":
            raise
        print(f"{error} (which runs now)", file=sys.stderr)
        return _run(model, asked.settled("eager"), sampler)
    if name != "eager":
        kept[spec] = run
        while len(kept) > KEPT:
            kept.popitem(last=False)
    return run


def _run(model, spec: RunSpec, sampler: Sampler) -> tuple[Engine, object]:
    engine = _engine(model, spec, sampler)
    return engine, EXECUTORS[spec.executor](engine)


def _engine(model, spec: RunSpec, sampler: Sampler) -> Engine:
    vocab, device = model.config.get_text_config().vocab_size, model.device
    sampling = DraftSampling.for_rule(spec.rule, sampler.do_sample, sampler.temperature)
    request = DraftRequest(spec.batch, spec.capacity, vocab, device, spec.shape, sampling)
    return Engine(
        state=DecodeState.empty(spec.batch, spec.capacity, spec.eos, device),
        target=SlotModel(model, spec.capacity),
        session=spec.drafter.open(request),
        sampler=sampler,
        rule=spec.rule,
        keep_scores=spec.keep_scores,
    )


def reset(model) -> None:
    """Free the engines kept with `model`, their caches and their compiled steps."""
    model.__dict__.pop("_paceline_runs", None)
    torch._dynamo.reset()
