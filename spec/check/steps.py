"""The third part of a check: what steps cost here, by executor, rows and nodes, beside transformers' `generate()`.

Idle engines are timed in turns, as by the planner: a step in which every row is done costs as much as a real one. For
each step the target's forward alone is timed too, and compared with a roofline: the time to read the weights and the
text's keys and values once at the measured memory bandwidth.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..engines.executors import Executor
from ..engines.pool import pool_of
from ..plan.step_times import IDLE_CAPACITY, Blank, in_turns, open_idle, slot_bytes, wait_for
from ..proposal import NoDrafter
from ..target.weights import stored_bytes
from ..tree import TreeShape
from .budget import Clock, Task, absent
from .record import NOT_HERE, Finding
from .subject import COMPILED, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (rows, nodes), the most informative first, in case time runs out.
SIZES = ((1, 1), (1, 8), (1, 4), (1, 16), (1, 2), (1, 32), (1, 64), (8, 1), (8, 4), (8, 8))
DRAFTED_LEVELS = (1, 4, 8)
KINDS = ("ngram", "hydra", "medusa", "draft model")
REPEATS, LEAST_TURNS = 15, 3
COMPARED_TOKENS = 16  # of transformers' generate()


@dataclass(slots=True)
class Timed:
    """A runner to time, and the seconds of making it; with `drafts` its steps include prompt lookup."""

    runner: Executor
    making_seconds: float
    text: int = IDLE_CAPACITY // 2  # tokens in its cache
    drafts: bool = False


class Steps:
    """The tasks of the part. For the next part (worth.py) it keeps seconds: `curves[executor][nodes]` of a step of one
    row, `drafts[executor][kind][levels]` of drafting."""

    def __init__(self, subject: Subject, clock: Clock):
        self.subject, self.clock = subject, clock
        self.runners: dict[str, dict[tuple, Timed]] = defaultdict(dict)  # [executor][rows, nodes, whole or "forward"]
        self.curves: dict[str, dict[int, float]] = {}
        self.drafts: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
        self.drafting: set[str] = set()  # executors some of whose timed steps include prompt lookup
        self.slot_bytes = 0

    def tasks(self) -> Iterator[Task]:
        running = self.subject.running
        cheap = [name for name in running if name not in COMPILED]
        for number, executor in enumerate(cheap):
            seconds = 0.6 * self.clock.left / (len(running) - number)
            yield Task({"executor": executor}, partial(self._time_cheap, executor, seconds))
        yield Task({"executor": "transformers"}, self._transformers)
        for executor in cheap:
            for kind in KINDS:
                yield Task({"executor": executor, "drafter": kind}, partial(self._time_drafting, executor, kind))
        for executor in (name for name in running if name in COMPILED):
            yield from self._compiled(executor)
        for executor in self.subject.executors:
            reason = self.subject.why_not(executor)
            if reason is not None:
                yield absent({"executor": executor}, reason)

    def _compiled(self, executor: str) -> Iterator[Task]:
        """Tasks: steps already compiled for texts are taken over, then one size after the other while there is time."""
        self._take_kept(executor)
        for rows, nodes in SIZES:
            seconds = self.subject.expected_compile() + 5.0  # and to time it
            known = (rows, nodes, "whole") in self.runners[executor]
            if known or self.clock.left < seconds:
                continue
            labels = {"executor": executor, "rows": rows, "nodes": nodes}
            yield Task(labels, partial(self._compile, executor, rows, nodes))
        yield Task({"executor": executor}, lambda: self._time_compiled(executor), short=True)

    def _take_kept(self, executor: str) -> None:
        for run in pool_of(self.subject.model).runs:
            spec, engine = run.spec, run.engine
            if spec.executor == executor and run.drafter.name in ("none", "ngram") and not spec.sampling[0]:
                run.wake(self.subject.model)
                text = engine.target.traits.capacity // 2
                engine.state.done.fill_(True)
                engine.state.lengths.fill_(text)
                key, drafts = (spec.batch, len(spec.shape), "whole"), run.drafter.name == "ngram"
                self.runners[executor][key] = Timed(run.executor, run.executor.making_seconds, text, drafts)
                self.drafting |= {executor} if drafts else set()

    def _open(self, executor: str, rows: int, nodes: int, part: str) -> Timed:
        drafter = Blank() if nodes > 1 else NoDrafter()
        started = time.perf_counter()
        model, shape = self.subject.model, TreeShape.chain(nodes - 1)
        runner = open_idle(model, executor, drafter, shape, work="forward" if part == "forward" else "step", batch=rows)
        return Timed(runner, time.perf_counter() - started)

    def _compile(self, executor: str, rows: int, nodes: int) -> list[Finding]:
        made = self.runners[executor][rows, nodes, "whole"] = self._open(executor, rows, nodes, "whole")
        self.subject.compile_seconds = made.making_seconds
        return []  # timed with the others at the end

    def _time_compiled(self, executor: str) -> list[Finding]:
        seconds = self.subject.expected_compile()
        findings = self._timed(executor, limit=4.0)
        return findings + self._left_out(executor, f"compiling a step takes about {seconds:.0f} s")

    @torch.no_grad()
    def _time_cheap(self, executor: str, seconds: float) -> list[Finding]:
        """Make as many runners as can be timed in turns within `seconds`, and time them."""
        turn, begun = 0.0, time.perf_counter()
        for rows, nodes, part in ((*size, part) for size in SIZES for part in ("whole", "forward")):
            made = self._open(executor, rows, nodes, part)
            turn += in_turns(self.subject.model, {0: made.runner}, repeats=1, warm_up=1)[0]
            if self.runners[executor] and time.perf_counter() - begun + turn * LEAST_TURNS > seconds:
                break
            self.runners[executor][rows, nodes, part] = made
        findings = self._timed(executor, limit=max(seconds - (time.perf_counter() - begun), 0.0))
        return findings + self._left_out(executor, "no time is left to time them")

    def _left_out(self, executor: str, reason: str) -> list[Finding]:
        """A finding for the sizes that were not timed, if there are any."""
        missing = [size for size in SIZES if (*size, "whole") not in self.runners[executor]]
        if not missing:
            return []
        labels = {"executor": executor, "nodes": f"{len(missing)} of {len(SIZES)} sizes"}
        return [Finding(labels, NOT_HERE, f"{reason}; give a larger --budget")]

    def _timed(self, executor: str, limit: float) -> list[Finding]:
        """Time all runners of an executor in turns: a finding for each size, and the curve for the planner."""
        made = self.runners[executor]
        if not made:
            return []
        runners = {key: timed.runner for key, timed in made.items()}
        seconds = in_turns(self.subject.model, runners, REPEATS, warm_up=1, limit=limit)
        whole = {(rows, nodes): s for (rows, nodes, part), s in seconds.items() if part == "whole"}
        self.curves[executor] = {nodes: s for (rows, nodes), s in whole.items() if rows == 1}
        self.slot_bytes = self.slot_bytes or slot_bytes(self.subject.model)
        findings = []
        for rows, nodes in SIZES:
            if (rows, nodes) in whole:
                times = whole[rows, nodes], seconds.get((rows, nodes, "forward"))
                findings.append(self._finding(executor, rows, nodes, times, made[rows, nodes, "whole"]))
        return findings

    def _finding(self, executor: str, rows: int, nodes: int, times: tuple, timed: Timed) -> Finding:
        """The finding for one size; `times` are the seconds of the whole step and of its forward (None: not timed)."""
        (step, forward), plain, bandwidth = times, self.curves[executor].get(1), self.subject.bandwidth
        figures = {"step_seconds": step, "of_plain": plain and step / plain, "making_seconds": timed.making_seconds}
        if forward is not None:
            figures |= {"forward_seconds": forward, "elsewhere": max(1 - forward / step, 0.0)}
        if not self.subject.has_experts:  # with experts, the bytes read depend on the tokens
            read = weights_read(self.subject.model) + rows * timed.text * self.slot_bytes
            figures["bytes_read"] = read
            figures["of_roofline"] = bandwidth and read / bandwidth / (forward or step)
        reason = "drafting by prompt lookup included" if timed.drafts else ""
        return Finding({"executor": executor, "rows": rows, "nodes": nodes}, reason=reason, figures=figures)

    @torch.no_grad()
    def _transformers(self) -> list[Finding]:
        """Seconds per token of transformers' own loop without the prompt: the median difference between a longer and a
        short call, over the number of tokens between them."""
        model, ids = self.subject.model, torch.ones(1, 8, dtype=torch.long, device=self.subject.device)

        def seconds(tokens: int) -> float:
            wait_for(model)
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
            wait_for(model)
            return time.perf_counter() - started

        seconds(1)  # warms up
        differences = [seconds(COMPARED_TOKENS + 1) - seconds(1) for _ in range(3)]
        token_seconds = max(statistics.median(differences), 0.0) / COMPARED_TOKENS
        return [Finding({"executor": "transformers"}, figures={"token_seconds": token_seconds})]

    @torch.no_grad()
    def _time_drafting(self, executor: str, kind: str) -> list[Finding]:
        """Seconds that drafting adds to a step with the same number of nodes; the two are timed in turns."""
        drafter, model = self.subject.drafter(kind), self.subject.model
        runners = {}
        for levels in DRAFTED_LEVELS:
            for part in (drafter, Blank()):
                runners[levels, part] = open_idle(model, executor, part, TreeShape.chain(levels))
        seconds = in_turns(model, runners, REPEATS // 3, warm_up=1, limit=0.1 * self.clock.left)
        costs = {levels: max(seconds[levels, drafter] - seconds[levels, Blank()], 0.0) for levels in DRAFTED_LEVELS}
        self.drafts[executor][kind] = {0: 0.0, **costs}
        labels = {"executor": executor, "drafter": kind}
        return [Finding({**labels, "levels": levels}, figures={"draft_seconds": s}) for levels, s in costs.items()]


def weights_read(model: "PreTrainedModel") -> int:
    """Bytes of weights that a step reads: all except the input embeddings, of which it reads a few rows only; tied
    embeddings count, as they are the LM head too."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total = stored_bytes(model)
    return total if embeddings is getattr(head, "weight", None) else total - embeddings.nbytes
