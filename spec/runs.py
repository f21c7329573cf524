"""Engines and their executors: made for a call, and kept where making them is expensive.

A compiled or captured step is bound to its buffers, so its engine stays with the model and takes the next
text of the same batch, tree, capacity, drafter and sampling. The last few are kept; they go with the model.
"""

import hashlib
import itertools
import sys
import time
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
    models: tuple[str, ...]  # as `placed` says

    def settled(self, executor: str) -> "RunSpec":
        """With `executor`, and the slots that it takes."""
        return replace(self, executor=executor, capacity=settled_capacity(self.capacity, executor))


def settled_capacity(needed: int, executor: str) -> int:
    """Slots for `needed` ones: in whole 64s where a size costs nothing, in powers of two where each size is compiled or
    captured."""
    return -(-needed // 64) * 64 if executor == "eager" else max(256, 1 << (needed - 1).bit_length())


def placed(model, drafter) -> tuple[str, ...]:
    """Where the target, and then each module of the drafter, is and how it attends, which may change between calls:
    attention, dtypes, devices and the addresses of all tensors, from which a captured step reads."""
    return tuple(_placed(module) for module in (model, *modules_of(drafter)))


def _placed(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        digest.update(f"{_address(tensor)} {tensor.dtype} {tensor.device};".encode())
    attention = module.config.get_text_config()._attn_implementation if hasattr(module, "config") else ""
    return f"{attention} {digest.hexdigest()}"


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def modules_of(drafter) -> list[torch.nn.Module]:
    """The modules that a drafter, or each of the drafters side by side, holds."""
    parts = getattr(drafter, "parts", (drafter,))
    held = [value for part in parts if hasattr(part, "__dict__") for value in vars(part).values()]
    return [value for value in held if isinstance(value, torch.nn.Module)]


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
    kept = kept_runs(model)
    for spec in [spec for spec in kept if spec.models[0] != asked.models[0]]:
        del kept[spec]  # bound to weights that are elsewhere now
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
    engine, started = make_engine(model, spec, sampler), time.perf_counter()
    executor = EXECUTORS[spec.executor](engine)
    executor.making_seconds = time.perf_counter() - started
    return engine, executor


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


class KeptRuns(OrderedDict[RunSpec, tuple[Engine, object]]):
    """The engines and executors kept with a model, the one used last at the end. Copies of the model, which have other
    weights, begin without any."""

    def __deepcopy__(self, memo) -> "KeptRuns":
        return KeptRuns()

    def __reduce__(self):
        return KeptRuns, ()


def kept_runs(model) -> KeptRuns:
    """What is kept with `model`."""
    return model.__dict__.setdefault("_paceline_runs", KeptRuns())


def keep(model, engines: int) -> None:
    """Let `model` keep as many, where that is more than usual, for a caller that comes back to all of them."""
    model.__dict__["_paceline_kept"] = engines


def reset(model) -> None:
    """Free the engines kept with `model`, their caches and their compiled steps."""
    model.__dict__.pop("_paceline_runs", None)
    model.__dict__.pop("_paceline_kept", None)
    torch._dynamo.reset()
