"""A CUDA graph on a CPU, as far as its rules go: record the operations of one step, replay them elsewhere.

The tape keeps every ATen operation of a step with its very tensors, and replays them into the same storages
without running any Python of the step: host values baked in, buffers rebound instead of written, Python
branches on data and shapes that follow data come out as wrong tokens. What a capture forbids outright is
named while recording. It cannot see memory-pool lifetimes, stream races or kernels that wait inside.
"""

import sys
from contextlib import contextmanager

import torch
from paceline.spec.engines import executors
from paceline.spec.kernels.linears import Packing
from paceline.spec.step import step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = {"_local_scalar_dense", "equal", "is_nonzero"}
DYNAMIC_SHAPES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"}


class Tape(TorchDispatchMode):
    """Records while active. `offences` names what a CUDA graph could not take."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []
        self.offences: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._inspect(function, args, kwargs)
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def _inspect(self, function, args, kwargs) -> None:
        name = function.__name__.split(".")[0]
        tensors = [value for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
        if name in HOST_READS:
            self.offences.append(f"host read ({name})")
        if name in DYNAMIC_SHAPES:
            self.offences.append(f"dynamic shape ({name})")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index.dtype == torch.bool for index in _leaves(args[1]) if isinstance(index, Tensor)
        ):
            self.offences.append(f"boolean index ({name})")
        if name == "lift_fresh" and not _from_a_processor():
            self.offences.append("host constant (torch.tensor)")
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1 or ("device" in kwargs and tensors and (
            kwargs["device"] not in (None, tensors[0].device)
        )):  # fmt: skip
            self.offences.append(f"cross-device copy ({name})")
        if torch.Tag.nondeterministic_seeded in function.tags and "attention" not in name:
            self.offences.append(f"unregistered randomness ({name})")

    def replay(self) -> None:
        for function, args, kwargs, recorded in self.operations:
            for old, new in zip(_leaves(recorded), _leaves(function(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape, f"{function} changed its shape"
                    old.copy_(new)


def _leaves(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _from_a_processor() -> bool:
    """`scores[..., -1:] = 0` in transformers' processors fills on the device under CUDA; on a CPU it goes
    through a lifted constant."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("generation/logits_process.py"):
            return True
        frame = frame.f_back
    return False


class TapeExecutor:
    """Records the first step of its engine and replays it for all others."""

    lag = 0
    making_seconds = 0.0
    made: "list[TapeExecutor]" = []  # noqa: RUF012

    def __init__(self, engine):
        self.packing = Packing(())  # as captured steps, which are for GPUs
        engine.idle_step()
        self.engine, self.tape, self.result, self.replays = engine, Tape(), None, 0
        TapeExecutor.made.append(self)

    def run(self, mark):
        if self.result is None:
            with host_readers_noted(self.tape.offences), self.tape:
                self.result = step(self.engine, lambda phase: None)
        else:
            self.tape.replay()
            self.replays += 1
        mark("step")
        return self.result


@contextmanager
def host_readers_noted(offences):
    """`tolist` and `numpy` read a CPU tensor without an operation that a tape could see."""
    plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy")}

    def noted(name):
        def reader(tensor, *args, **kwargs):
            offences.append(f"host read ({name})")
            return plain[name](tensor, *args, **kwargs)

        return reader

    for name in plain:
        setattr(Tensor, name, noted(name))
    try:
        yield
    finally:
        for name, reader in plain.items():
            setattr(Tensor, name, reader)


@contextmanager
def tape_executor(patch):
    """Let `generate(executor="tape")` run by tape; yields the list of tapes made."""
    patch.setitem(executors.EXECUTORS, "tape", TapeExecutor)
    TapeExecutor.made.clear()
    yield TapeExecutor.made
