"""The one training loop, for every objective, on accelerate.

A step reads `batch` rows, the same ones whatever the number of processes, sums the loss over all counted tokens
(passes.py) and divides the gradient by their number. All random numbers are seeded by (seed, step, process), so that a
run resumes exactly from a checkpoint. Knows nothing of drafters.
"""

import contextlib
import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from torch import Tensor

from ..spec.files import write_json
from ..spec.plan.trees import MODEST, Acceptance, best_tree
from .acceptance import record
from .checkpoint import Checkpoints, differences, gather, read_state, restore, write_state
from .config import Config
from .data.rows import Rows, rows_of_step
from .metrics import Report, Tally
from .objectives.objective import Objective
from .optimisation import adamw, schedule
from .passes import Passes
from .signals import Stop, first_signal


class Trainer:
    """Trains `objective` on `splits` with the hidden states of `target` (an OnlineTarget, OfflineTarget or None).

    A checkpoint can be resumed only if its `identity` is the same; `documents` are files (name: text) that are written
    into every checkpoint. `decoding`, where given, measures tokens per step with a drafter folder."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        objective: Objective,
        target,
        splits: dict[str, Rows],
        identity: dict,
        documents: dict[str, str],
        decoding: Callable[[Path], float] | None = None,
    ):
        ranks, batch = accelerator.num_processes, config.optimisation.batch
        if batch % ranks:
            raise ValueError(f"optimisation.batch {batch} does not divide by {ranks} processes; choose a multiple")
        self.config, self.accelerator, self.splits = config, accelerator, splits
        self.identity, self.documents, self.decoding = identity, documents, decoding
        self.depths = objective.depths
        self.steps = 0
        # Under FSDP2 the weights are sharded; this copy on the CPU receives the gathered weights and saves them.
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and decoding is not None:
            raise ValueError("run.decode_prompts decodes with whole weights and FSDP shards them; leave it out")
        self.saved = copy.deepcopy(objective).cpu() if self.sharded and accelerator.is_main_process else None
        optimizer = adamw(objective, config.optimisation)
        model, self.optimizer = accelerator.prepare(objective, optimizer)
        self.objective = accelerator.unwrap_model(model)
        self.stop = Stop()
        self.passes = Passes(config, accelerator, model, self.objective, target, splits, self.stop)
        self.checkpoints = Checkpoints(Path(config.run.folder), config.run.keep)
        self.step, self.window, self.tokens = 0, Tally(), 0.0
        self.best: dict | None = None  # step and tokens_per_step
        self.acceptance = -1, Acceptance([], [])  # the last evaluated step and the acceptance there

    def train(self, steps: int) -> int | None:
        """Train up to step `steps`; returns the number of the signal that stopped it, if any.

        Raises ValueError where the loss is no number or a checkpoint cannot be written; earlier ones stay."""
        self.steps, run = steps, self.config.run
        report = Report(Path(run.folder), self.accelerator, steps, self.step, dataclasses.asdict(self.config))
        with first_signal(self.stop.heed), contextlib.closing(self), contextlib.closing(report):
            started, tokens = time.perf_counter(), self.tokens
            while self.step < steps and self.stop.heard is None:
                rate, norm = self._train_step()
                report.bar.update()
                speed = (self.tokens - tokens) / (time.perf_counter() - started)
                report.show(self.window, rate, speed)
                if self.step % run.log_every == 0 or self.step == steps:
                    extra = {"learning_rate": rate, "gradient_norm": norm, "tokens": self.tokens}
                    report.write(self.step, {**self.window.figures("train"), **extra, "tokens_per_second": speed})
                    self.window = Tally()
                better = False
                if self.step % run.evaluate_every == 0 or self.step == steps:
                    better = self._evaluate(report)
                if self.step % run.save_every == 0 or better or self.step == steps or self.stop.heard is not None:
                    self.save()
        return self.stop.heard

    def close(self) -> None:
        """Leave the process group. The DDP wrapper is dropped first: as the group's last owner it would wait for gloo's
        threads while it holds the GIL, and they may be waiting for the GIL."""
        self.passes.model = self.objective
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _train_step(self) -> tuple[float, float]:
        """Run one step; returns the learning rate and the norm of the gradient."""
        accelerator, settings = self.accelerator, self.config.optimisation
        rate = self._begin_step()
        rows = rows_of_step(self.step, settings.batch, len(self.splits["train"]), self.config.run.seed)
        tally = self.passes.gradient(rows)
        if not math.isfinite(tally.total):
            raise self._not_a_number("the loss", rows)
        if tally.counted:  # otherwise these rows have no token to learn from
            factor = self.passes.nominal() / tally.counted
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
            norm = float(_whole(accelerator.clip_grad_norm_(self.passes.model.parameters(), settings.clip)))
            if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips the step instead
                raise self._not_a_number("the gradient", rows)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.window.add(tally)
        self.tokens += tally.tokens
        return rate, norm if tally.counted else 0.0

    def _begin_step(self) -> float:
        """Seed this step's random numbers and set its learning rates; returns the rate of ordinary groups."""
        set_seed((self.config.run.seed * 1_000_003 + self.step) * 4_099 + self.accelerator.process_index & 0xFFFFFFFF)
        share = schedule(self.step, self.steps, self.config.optimisation)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        return self.config.optimisation.learning_rate * share

    def _evaluate(self, report: Report) -> bool:
        """Evaluate on held-out text; returns whether the result is the best so far."""
        tally, acceptance = self.passes.evaluate()
        if not tally.counted:
            return False
        self.acceptance = self.step, acceptance
        if not math.isfinite(tally.total):
            raise self._not_a_number("the loss on held-out text", [])
        figures = tally.figures("eval")
        if self.decoding is not None:
            self._on_main(lambda: figures.update({"eval/measured_tokens_per_step": self._decoded()}))
        report.write(self.step, figures)
        tokens_per_step = figures["eval/tokens_per_step"]
        better = self.best is None or tokens_per_step > self.best["tokens_per_step"]
        if better:
            self.best = {"step": self.step, "tokens_per_step": tokens_per_step}
        return better

    def _decoded(self) -> float:
        """Measured tokens per step of decoding with the drafter in its present state."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_drafter(Path(folder))
            return self.decoding(Path(folder))

    def _save_drafter(self, folder: Path) -> None:
        """Write a drafter folder, with `acceptance.json` where this step has been evaluated."""
        (self.saved or self.objective).save(folder)
        step, counts = self.acceptance
        if step == self.step:
            method = {"counted": "teacher-forced on held-out rows in training", "step": step}
            shape = best_tree(counts.rates(), MODEST, self.depths)[0]
            write_json(folder / "acceptance.json", {**record(counts, shape), "how": method})

    def measure(self, steps: int = 2, learn: bool = False) -> tuple[float, float]:
        """Run at least two steps; tokens per second (the first step is not timed) and the last loss. Parameters change
        only with `learn`."""
        self.steps, tokens = steps, 0.0
        for step in range(steps):
            if step == 1:
                started = time.perf_counter()
            if learn:
                self.window = Tally()
                self._train_step()
                tally = self.window
            else:
                self._begin_step()
                tally = self.passes.gradient(
                    rows_of_step(step, self.config.optimisation.batch, len(self.splits["train"]), 0)
                )
            tokens += tally.tokens if step else 0.0
        self.optimizer.zero_grad()
        return tokens / (time.perf_counter() - started), tally.total / max(tally.counted, 1.0)

    def save(self) -> None:
        """Write the checkpoint of this step and update `latest` and `best`. All processes must call it."""
        weights, moments = gather(self.objective, self.optimizer)
        self._on_main(lambda: self._write(weights, moments))

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        best, checkpoints = self.best, self.checkpoints
        scaler = self.accelerator.scaler
        state = {
            "step": self.step, "tokens": self.tokens, "best": best, "window": dataclasses.asdict(self.window),
            "identity": self.identity, "scaler": scaler.state_dict() if scaler else None,
        }  # fmt: skip

        def fill(folder: Path) -> None:
            if self.saved is not None:
                self.saved.load_state_dict(weights, strict=False)
            self._save_drafter(folder)
            write_state(folder / "trainer", weights, moments, state)
            for name, text in self.documents.items():
                (folder / "trainer" / name).write_text(text, encoding="utf-8")

        if self.step not in checkpoints.steps():
            checkpoints.write(self.step, fill)
        self._point(checkpoints)

    def _point(self, checkpoints: Checkpoints) -> None:
        checkpoints.point("latest", checkpoints.steps()[-1])
        if self.best is not None and self.best["step"] in checkpoints.steps():
            checkpoints.point("best", self.best["step"])
        checkpoints.rotate(self.best["step"] if self.best else None)

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False where there is none.

        Raises ValueError, with all differences, where it is of another target, tokenizer, data or objective."""
        self._on_main(self.checkpoints.clean)
        steps = self.checkpoints.steps()
        if not steps:
            return False
        folder = self.checkpoints.folder(steps[-1])
        weights, moments, state = read_state(folder / "trainer")
        if mismatches := differences(self.identity, state["identity"]):
            raise ValueError(
                f"{folder} cannot be resumed: {'; '.join(mismatches)}; restore that, or train into another run.folder"
            )
        restore(self.objective, self.optimizer, weights, moments)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.best = state["step"], state["tokens"], state["best"]
        self.window = Tally(**state["window"])
        self._on_main(lambda: self._point(self.checkpoints))
        return True

    def _on_main(self, act) -> None:
        """Call `act` in the main process; a ValueError there is raised in all processes."""
        said: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                act()
            except ValueError as error:
                said = [str(error)]
        broadcast_object_list(said)
        if said[0] is not None:
            raise ValueError(said[0])

    def _not_a_number(self, quantity: str, rows: list[int]) -> ValueError:
        kept = self.checkpoints.steps()
        rows_in_words = f" on rows {rows} of the data" if rows else ""
        last = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
        return ValueError(
            f"{quantity} of step {self.step} is not a finite number{rows_in_words}; {last}; lower "
            "optimisation.learning_rate or look at these rows"
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
