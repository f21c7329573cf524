"""Forwards and gradients of a step: some rows of the data, summed over micro-batches and processes.

Losses are sums over counted tokens, so that neither the size of a micro-batch nor the number of processes enters. Knows
nothing of optimisers, checkpoints or drafters.
"""

import contextlib
import signal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..spec.plan.trees import Acceptance
from .acceptance import WIDTH
from .config import Config
from .data.rows import Rows
from .metrics import Tally
from .objectives.objective import Batch, Losses, Objective, TargetView, count_ranks
from .objectives.target import OfflineTarget, OnlineTarget
from .signals import Stop


class Passes:
    """`model` is `objective` as accelerate has wrapped it. A signal that `stop` got reaches all processes with the next
    sum."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        target: OnlineTarget | OfflineTarget | None,
        splits: dict[str, Rows],
        stop: Stop,
    ):
        self.config, self.accelerator, self.model, self.objective = config, accelerator, model, objective
        self.target, self.splits, self.stop, self.depths = target, splits, stop, objective.depths

    def nominal(self) -> int:
        """A number of tokens to scale sums by before the true one is known, so that float16 can hold them."""
        return self.config.optimisation.batch * self.splits["train"].length

    def gradient(self, rows: list[int]) -> Tally:
        """Leave the gradient of the summed loss of `rows`, divided by the nominal count, in the parameters."""
        accelerator, micro = self.accelerator, self.config.optimisation.micro_batch
        self.model.train()
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        parts = [mine[start : start + micro] for start in range(0, len(mine), micro)]
        # Wrappers average gradients over the processes; the sum is wanted.
        scale = accelerator.num_processes / self.nominal()
        sums = self._zeros()
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                losses, numbers = self._forward(*self._read("train", part))
                accelerator.backward(losses.total * scale)
            sums += numbers
        return self._reduce(sums)

    @torch.no_grad()
    def evaluate(self) -> tuple[Tally, Acceptance]:
        """The tally over the held-out rows and the acceptance there; the same number of forwards in every process."""
        accelerator, micro = self.accelerator, self.config.optimisation.micro_batch
        count = min(len(self.splits.get("held_out", ())), self.config.data.held_out_rows)
        self.model.eval()
        sums, ranks = self._zeros(), []
        with self._whole_weights():
            for start in range(0, count, micro * accelerator.num_processes):
                first = start + accelerator.process_index * micro
                rows = list(range(first, min(first + micro, count)))
                read = self._read("held_out", rows or [0], counting=len(rows))
                sums += self._forward(*read)[1]
                ranks.append(self.objective.label_ranks(*read))
        acceptance = Acceptance([], [])
        if count:
            counts = count_ranks(ranks, self.depths, WIDTH)
            both = torch.tensor([counts.hits, counts.trials], device=accelerator.device)  # (2, depths, width)
            acceptance = Acceptance(*accelerator.reduce(both, "sum").tolist())
        return self._reduce(sums), acceptance

    def _read(self, split: str, rows: list[int], counting: int | None = None) -> tuple[Batch, TargetView | None]:
        """Some rows, and what the target saw on them; rows from place `counting` on count for nothing."""
        batch = self.splits[split].batch(rows, self.accelerator.device)
        if counting is not None:
            batch["loss_mask"][counting:] = 0
            batch["document"][counting:] = -1
        seen = self.target.view(batch, split, rows) if self.objective.taps else None
        return batch, seen

    def _forward(self, batch: Batch, seen: TargetView | None) -> tuple[Losses, Tensor]:
        """The losses of a batch, and their sums as one vector."""
        with self.accelerator.autocast():  # the wrappers of other kinds do it themselves, FSDP2 does not
            losses = self.model(batch, seen)
        tokens = (batch["document"] >= 0).sum()
        sums = self._zeros()
        sums[:3] = torch.stack([losses.total.detach().to(sums), losses.counted.to(sums), tokens.to(sums)])
        sums[3:-1] = torch.cat([losses.hits.to(sums), losses.tried.to(sums)])
        return losses, sums

    def _zeros(self) -> Tensor:
        """total, counted, tokens, hits, tried, stop."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which has no float64
        return torch.zeros(4 + 2 * self.depths, dtype=dtype, device=device)

    def _reduce(self, sums: Tensor) -> Tally:
        """The sums over all processes. A signal that any of them got reaches all of them on the way."""
        sums[-1] = self.stop.got is not None
        values = self.accelerator.reduce(sums, "sum").tolist()
        if values[-1]:
            self.stop.heard = self.stop.got or signal.SIGTERM
        return Tally(*values[:3], hits=values[3 : 3 + self.depths], tried=values[3 + self.depths : -1])

    @contextlib.contextmanager
    def _whole_weights(self):
        """Within, weights that FSDP2 shards are whole outside of forwards too, and afterwards they are shards again:
        after a forward that no backward follows they would stay whole, and strangers to the optimizer."""
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
