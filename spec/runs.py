"""Engines and their executors: made for a call, and kept where making them is expensive.

A compiled or captured step is bound to its buffers, so its engine stays with the model and takes the next
text of the same batch, tree, capacity, drafter and sampling. The last few are kept; they go with the model.
"""

import sys
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from .executors import EXECUTORS, choose
from .hidden import lm_head
from .packing import pack
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
    model: str  # as `placed` says

    def settled(self, executor: str) -> "RunSpec":
        """With `executor`, and slots in whole 64s where a size costs nothing, in powers of two where each
        size is compiled or captured."""
        captured = max(256, 1 << (self.capacity - 1).bit_length())
        capacity = -(-self.capacity // 64) * 64 if executor == "eager" else captured
        return replace(self, executor=executor, capacity=capacity)


def placed(model) -> str:
    """The device, dtype and attention of `model`, which may change between calls."""
    return f"{model.device} {model.dtype} {model.config.get_text_config()._attn_implementation}"


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
        pack(kept[spec][0].packable)  # again, where weights have changed
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
        while len(kept) > max(KEPT, model.__dict__.get("_paceline_kept", 0)):
            kept.popitem(last=False)
    return run


def _run(model, spec: RunSpec, sampler: Sampler) -> tuple[Engine, object]:
    engine = make_engine(model, spec, sampler)
    return engine, EXECUTORS[spec.executor](engine)


def make_engine(model, spec: RunSpec, sampler: Sampler) -> Engine:
    """An engine for `spec` with fresh buffers."""
    drawing = DraftSampling.for_rule(spec.rule, sampler.do_sample, sampler.temperature)
    what = spec.drafter, spec.shape, sampler, drawing, spec.rule
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
    reads_hidden = getattr(drafter, "reads_hidden", False)
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
    model.__dict__["_paceline_kept"] = engines


def reset(model) -> None:
    """Free the engines kept with `model`, their caches and their compiled steps."""
    model.__dict__.pop("_paceline_runs", None)
    model.__dict__.pop("_paceline_kept", None)
    torch._dynamo.reset()
