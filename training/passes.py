"""The forward and backward passes of a step, summed over micro-batches and processes.

Losses are sums over counted tokens, so that the result depends neither on the micro-batch size nor on the number of
processes. Knows nothing of optimisers, checkpoints or drafters.
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
    """`model` is `objective` as wrapped by accelerate. A signal received by one process (`stop`) is passed to all
    processes with the next sum."""

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
        """The tokens of a full batch: divides sums before the true count is known, so that they fit in float16."""
        return self.config.optimisation.batch * self.splits["train"].length

    def gradient(self, rows: list[int]) -> Tally:
        """Compute the gradient of the summed loss of `rows` over the nominal count, and leave it in the parameters."""
        accelerator, micro = self.accelerator, self.config.optimisation.micro_batch
        self.model.train()
        rows_of_rank = rows[accelerator.process_index :: accelerator.num_processes]
        parts = [rows_of_rank[start : start + micro] for start in range(0, len(rows_of_rank), micro)]
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
        """Tally and acceptance on the held-out rows. Every process runs the same number of forwards."""
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
        """The batch of `rows` and the target's view of it. Rows from index `counting` on are masked out."""
        batch = self.splits[split].batch(rows, self.accelerator.device)
        if counting is not None:
            batch["loss_mask"][counting:] = 0
            batch["document"][counting:] = -1
        seen = self.target.view(batch, split, rows) if self.objective.taps else None
        return batch, seen

    def _forward(self, batch: Batch, seen: TargetView | None) -> tuple[Losses, Tensor]:
        """The losses of a batch, and the same as one vector in the order of `_zeros`."""
        with self.accelerator.autocast():  # other wrappers do it themselves, FSDP2 does not
            losses = self.model(batch, seen)
        tokens = (batch["document"] >= 0).sum()
        sums = self._zeros()
        sums[:3] = torch.stack([losses.total.detach().to(sums), losses.counted.to(sums), tokens.to(sums)])
        sums[3:-1] = torch.cat([losses.hits.to(sums), losses.tried.to(sums)])
        return losses, sums

    def _zeros(self) -> Tensor:
        """A zero vector for the sums total, counted, tokens, hits (depths), tried (depths), stop."""
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        return torch.zeros(4 + 2 * self.depths, dtype=dtype, device=device)

    def _reduce(self, sums: Tensor) -> Tally:
        """The sums over all processes. Also tells all processes of a signal that any of them received."""
        sums[-1] = self.stop.got is not None
        values = self.accelerator.reduce(sums, "sum").tolist()
        if values[-1]:
            self.stop.heard = self.stop.got or signal.SIGTERM
        return Tally(*values[:3], hits=values[3 : 3 + self.depths], tried=values[3 + self.depths : -1])

    @contextlib.contextmanager
    def _whole_weights(self):
        """Within, FSDP2's sharded weights are unsharded, also between forwards; on exit they are sharded again. Without
        this they would stay unsharded after a forward without backward, and the optimizer would not know them."""
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
