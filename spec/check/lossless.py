"""The second part of a check: is drafted text the text of plain decoding, with every executor that can run here?

After the target's self-test, texts are decoded plainly and with every kind of drafter, greedily and sampled with seeds,
as one row and as a ragged batch of four, and compared token by token. In low precision forwards of different shapes
round differently, so that texts may differ where two tokens are nearly tied. This rounding is measured on the model,
and a difference that it cannot explain is a failure.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import noise
from ..bench.divergence import parting, rounding_can_swap
from ..engines.pool import pool_of
from ..engines.runs import keep
from ..generate import SpeculativeOutput, generate
from ..plan.step_times import wait_for
from ..proposal import NoDrafter
from ..sampling import warpers
from ..target.protocol import spans
from ..target.selftest import attach, self_test
from ..target.slots import SlotModel
from ..tree import TokenTree, TreeShape
from .budget import Clock, Task, absent, single
from .captured import captured_tasks
from .record import FAILS, Finding
from .subject import COMPILED, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS, CHUNK = 24, 16  # so that prompts are read in two chunks
TEMPERATURE, TOP_P = 0.8, 0.9
SEEDS = (11, 12, 13, 14)
COMBINATIONS = ((1, "greedy"), (4, "seeded"), (1, "seeded"), (4, "greedy"))  # rows and way
EIGHT_NODES = TreeShape((-1, 0, 0, 1, 2, 3, 4, 5))
DRAFTS = {  # the kind of drafter and its tree
    "ngram tree": ("ngram", EIGHT_NODES),
    "draft model": ("draft model", TreeShape.parse("2x1x1")),
    "hydra": ("hydra", TreeShape.parse("3x1x1")),
    "ngram chain": ("ngram", TreeShape.chain(4)),
    "medusa": ("medusa", TreeShape.parse("3x1x1")),
}
MOST_TOKENS, LEAST_TOKENS = 32, 6  # of a text
PROBED = 8  # nodes over which rounding is measured
# Spacings of the dtype's numbers at the largest logit by which rounding may move a logit: about twice as many as were
# seen on models without a fault. In float32 even the larger number is little, and where a token may be sent to another
# expert no bound is tight.
SPACINGS, LOOSE_SPACINGS = 6, 64


class Lossless:
    """The tasks of the part, and what they share: prompts, texts of plain decoding, and the affordable length."""

    def __init__(self, subject: Subject, clock: Clock):
        self.subject, self.clock = subject, clock
        self.prompts = {rows: _prompts(rows, subject) for rows in (1, 4)}
        self.plain: dict[tuple[int, str], Tensor] = {}
        self.new_tokens, self.token_seconds = LEAST_TOKENS, 0.0
        self.rounding: float | None = None
        self.attached = False
        self.checked: Counter[str] = Counter()  # [executor]: combinations

    def tasks(self) -> Iterator[Task]:
        keep(self.subject.model, 64)  # the steps made here are timed in the next part
        yield Task({"promise": "self-test of the target"}, self._attach)
        if not self.attached:
            return
        yield Task({"promise": "rounding of logits"}, self._measure_rounding)
        if self.rounding is None:
            return
        cheap = [name for name in self.subject.running if name not in COMPILED]
        compiled = [name for name in self.subject.running if name in COMPILED]
        half = len(COMBINATIONS) // 2 * len(DRAFTS)
        for executor in cheap:
            yield from self._texts(executor, half)
            if executor != "eager":
                yield from captured_tasks(self.subject, executor, self.new_tokens)
        for executor in compiled:
            yield from self._texts(executor, 2)
        for executor in cheap + compiled:
            yield from self._texts(executor, len(self._combinations(executor)))
            if executor == "cuda_graph_compiled":
                yield from captured_tasks(self.subject, executor, self.new_tokens)
        for executor in self.subject.executors:
            reason = self.subject.why_not(executor) or self._left_out(executor)
            if reason is not None:
                yield absent({"promise": "same text", "executor": executor}, reason)

    def _combinations(self, executor: str) -> list[tuple[str, int, str]]:
        """(drafter, rows, way), the most informative first; without plain decoding ("none") for the eager executor,
        which is what all others are compared with."""
        kinds = [*DRAFTS] if executor == "eager" else [next(iter(DRAFTS)), "none", *list(DRAFTS)[1:]]
        return [(kind, rows, way) for rows, way in COMBINATIONS for kind in kinds]

    def _texts(self, executor: str, count: int) -> Iterator[Task]:
        """Tasks for those of the first `count` combinations that are not checked yet, while there is time."""
        for kind, rows, way in self._combinations(executor)[self.checked[executor] : count]:
            if self.clock.left < self._seconds(executor, rows):
                return
            self.checked[executor] += 1
            labels = {"promise": "same text", "executor": executor, "drafter": kind, "rows": rows, "way": way}
            yield Task(labels, single(self._same_text, labels))

    def _seconds(self, executor: str, rows: int) -> float:
        """A rough estimate of the time to check one combination."""
        compiling = self.subject.expected_compile() if executor in COMPILED else 0.0
        return compiling + self.new_tokens * self.token_seconds * (1.0 + 0.5 * rows)

    def _left_out(self, executor: str) -> str | None:
        total = len(self._combinations(executor))
        missing = total - self.checked[executor]
        if not missing:
            return None
        seconds = self._seconds(executor, 1)
        left_out = f"{missing} of {total} combinations of drafter, rows and way"
        return f"{left_out}; each takes about {seconds:.0f} s; give a larger --budget"

    def _attach(self) -> list[Finding]:
        attach(self.subject.model)
        self.attached = True
        figures = {"relative_error": self_test(self.subject.model)}
        return [Finding({"promise": "self-test of the target"}, figures=figures)]

    def _measure_rounding(self) -> list[Finding]:
        """Measure rounding, and choose the length of texts from the speed of plain decoding."""
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            self._decode("eager", "none", 1, "greedy", 4)
            wait_for(self.subject.model)
            self.token_seconds = (time.perf_counter() - started) / 4
        texts = len(COMBINATIONS) * (len(DRAFTS) + 1) * 1.25
        compiling = self.subject.expected_compile() if set(COMPILED) & set(self.subject.running) else 0.0
        left = self.clock.left - (compiling if 2 * compiling < self.clock.left else 0.0)
        affordable = int(0.5 * left / (texts * self.token_seconds))
        self.new_tokens = min(max(affordable, LEAST_TOKENS), MOST_TOKENS)
        text = self._decode("eager", "none", 1, "greedy", self.new_tokens).sequences[0]
        rounding, plain, largest = _rounding(self.subject.model, text)
        if not rounding < float("inf"):
            raise ValueError("the logits hold NaN or infinite numbers; check the weights and the dtype")
        loose = self.subject.has_experts or self.subject.dtype in (torch.float32, torch.float64)
        spacings = LOOSE_SPACINGS if loose else SPACINGS
        allowed = max(spacings * torch.finfo(self.subject.dtype).eps * largest, 3 * plain)
        if rounding > allowed:
            raise ValueError(
                f"the logits of drafted tokens are up to {rounding:.2g} from those of a forward without cache, where "
                f"rounding explains {allowed:.2g}"
            )
        self.rounding = rounding
        return [Finding({"promise": "rounding of logits"}, figures={"rounding": rounding})]

    def _decode(self, executor: str, kind: str, rows: int, way: str, new_tokens: int) -> SpeculativeOutput:
        name, shape = DRAFTS.get(kind, ("none", TreeShape.chain(0)))
        drafter = NoDrafter() if name == "none" else self.subject.drafter(name)
        sampling: dict = {"do_sample": False}
        if way == "seeded":
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        out = generate(
            self.subject.model, *self.prompts[rows], drafter=drafter, tree=shape, executor=executor,
            seed=list(SEEDS[:rows]), prefill_chunk=CHUNK, max_new_tokens=new_tokens, pad_token_id=0,
            return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        assert isinstance(out, SpeculativeOutput)
        return out

    def _truth(self, rows: int, way: str) -> Tensor:
        if (rows, way) not in self.plain:
            self.plain[rows, way] = self._decode("eager", "none", rows, way, self.new_tokens).sequences
        return self.plain[rows, way]

    def _same_text(self, labels: dict) -> Finding:
        executor, rows, way = labels["executor"], labels["rows"], labels["way"]
        truth, known = self._truth(rows, way), set(map(id, pool_of(self.subject.model).runs))
        out = self._decode(executor, labels["drafter"], rows, way, self.new_tokens)
        assert out.trace is not None
        figures = {"texts": rows, "parted": 0, "tokens_per_step": out.trace.summary()["tokens_per_step"]}
        for run in pool_of(self.subject.model).runs:
            if id(run) not in known:
                figures["making_seconds"] = run.executor.making_seconds
                if executor in COMPILED:
                    self.subject.compile_seconds = run.executor.making_seconds
        finding = Finding(labels, figures=figures)
        for row in range(rows):
            self._judge(finding, rows, row, way, truth[row].tolist(), out.sequences[row].tolist())
        return finding

    def _judge(self, finding: Finding, rows: int, row: int, way: str, plain: list[int], drafted: list[int]) -> None:
        """Note in `finding` where two texts of a row differ first, and whether rounding explains it."""
        position = parting(plain, drafted)
        if position is None:
            return
        figures = finding.figures
        figures["parted"] += 1
        number = position - PROMPT_TOKENS + 1
        said = f"row {row} leaves the text of plain decoding at token {number} of {self.new_tokens}"
        if position >= min(len(plain), len(drafted)):
            finding.verdict, finding.reason = FAILS, f"{said}, where one of them ends"
            return
        _, mask = self.prompts[rows]
        text = plain[PROMPT_TOKENS - int(mask[row].sum()) : position]
        explained, gap = self._explained(text, plain[position], drafted[position], row, way)
        figures["margin"] = max(gap, figures.get("margin", 0.0))
        figures["rounding"] = self.rounding
        apart = f"{said}, where the two tokens' logits are {gap:.2g} apart and rounding is {self.rounding:.2g}"
        if not explained:
            finding.verdict, finding.reason = FAILS, apart
        elif finding.verdict != FAILS:
            finding.reason = f"{apart}: a near-tie"

    @torch.no_grad()
    def _explained(self, text: list[int], plain: int, drafted: int, row: int, way: str) -> tuple[bool, float]:
        assert self.rounding is not None  # measured before any text is compared
        model, device = self.subject.model, self.subject.device
        logits = model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0, -1].float()
        if way == "greedy":
            return rounding_can_swap(logits, plain, drafted, self.rounding, lambda scores: scores)
        warp, vocabulary = warpers(TEMPERATURE, TOP_P), torch.arange(len(logits), device=device)
        keys, position = noise.row_keys([SEEDS[row]], 1, device), torch.tensor([[len(text)]], device=device)
        gumbel = noise.gumbel(keys, position, noise.TARGET, vocabulary)[0]
        return rounding_can_swap(logits, plain, drafted, self.rounding, lambda scores: warp(None, scores) + gumbel)


@torch.no_grad()
def _rounding(model: "PreTrainedModel", text: Tensor) -> tuple[float, float, float]:
    """Three numbers for `text` (T,): the largest difference of a logit between a forward without cache and forwards
    over slots of its last tokens as a chain (like drafted decoding) and of one of them (like plain decoding); the
    largest difference between two forwards without cache of different shapes; and the largest logit."""
    ids, base = text[None], torch.tensor([len(text) - PROBED], device=text.device)
    truth = model(input_ids=ids, use_cache=False).logits[0, -PROBED:].float()
    beside = model(input_ids=torch.cat([ids, ids.flip(1)]), use_cache=False).logits[0, -PROBED:].float()
    slots = SlotModel(model, 1, capacity=-(-(len(text) + 2) // 64) * 64)
    for span in spans(ids, base + 1, CHUNK):
        slots.read(span)
    rounding = 0.0
    for nodes in (PROBED, 1):
        tree = TokenTree.of(TreeShape.chain(nodes - 1), text.device)
        logits = slots.forward_nodes(ids[:, -PROBED:][:, :nodes], base, tree).logits[0]
        if not logits.isfinite().all():
            rounding = float("nan")
        rounding = max(rounding, float((logits - truth[:nodes]).abs().max()))
    return rounding, float((beside - truth).abs().max()), float(truth.abs().max())


def _prompts(rows: int, subject: Subject) -> tuple[Tensor, Tensor]:
    """Random tokens, the second half of each row like its first, so that prompt lookup has something to find; rows of
    24, 17, 10 and 3 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(rows)
    half = torch.randint(subject.vocabulary // 8, subject.vocabulary, (rows, PROMPT_TOKENS // 2), generator=generator)
    padding = 7 * torch.arange(rows)[:, None]
    mask = (torch.arange(PROMPT_TOKENS) >= padding).long()
    ids = torch.cat([half, half], dim=1) * mask
    return ids.to(subject.device), mask.to(subject.device)
