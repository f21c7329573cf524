"""A request on its way: what has become of it so far. Knows nothing of engines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from ..request import Request
from ..step import RowReport
from .row_sampler import SamplingKind
from .running_text import RunningText
from .text_request import TextRequest

DEVICE_ERRORS = torch.OutOfMemoryError, torch.AcceleratorError


class Phase(StrEnum):
    """Where a job is."""

    WAITING = "waiting"
    READING = "reading"  # its prompt is being read in a lane, or has been
    RUNNING = "running"  # in a row of the batch
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token by the model's logits, and those of the likeliest tokens, the likeliest first."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]

    @classmethod
    def of(cls, logits: Tensor, token: int, count: int) -> "TokenLogprobs":
        """From `logits` (V,)."""
        logprobs = logits.float().log_softmax(-1)
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        return cls(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist())))


@dataclass(slots=True, eq=False)
class Job:
    """A request with its result so far; `reason` says why it ended: stop, length, abort or error."""

    asked: TextRequest  # as it was checked
    request: Request
    listener: "Callable[[Job], None] | None" = None  # called when reading begins, when there are tokens, and at the end
    running_text: RunningText | None = None  # None without a tokenizer
    kind: SamplingKind = field(init=False)  # what steps it needs
    phase: Phase = Phase.WAITING
    reason: str = ""
    problem: str = ""  # of an error, in a sentence
    unscored: bool = False  # whether the error is that no token could be chosen by the scores
    shown: str = ""  # the text so far, without an end that may become a stop string
    tokens: list[int] = field(default_factory=list)  # the new ones
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of these
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's, from the second on
    drafted_here: list[bool] = field(default_factory=list)  # [token]: whether it was drafted
    accepted_at: list[int] = field(default_factory=list)  # [depth]: how many drafted tokens were accepted there
    steps: int = 0
    drafted: int = 0
    reused: int = 0  # tokens of the prompt that were not read again

    def __post_init__(self) -> None:
        self.kind = SamplingKind.of(self.asked)

    @property
    def text(self) -> str | None:
        return None if self.running_text is None else self.running_text.text

    @property
    def seed(self) -> int:
        assert self.asked.seed is not None
        return self.asked.seed

    @property
    def accepted(self) -> int:
        return sum(self.drafted_here)

    def take(self, report: RowReport, logits: Tensor | None) -> None:
        """Add what a step has brought; `logits` (D+1, V) are those of its accepted path, where asked for. Stops, with
        the reason `stop`, at the token that completes a stop string."""
        path = report.path[1 : report.accepted + 1]
        brought = [*(report.tokens[node] for node in path), report.bonus][: report.committed]
        self.steps += 1
        self.drafted += sum(token >= 0 for token in report.tokens[1:])
        for depth, token in enumerate(brought):
            was_drafted = depth < len(path)
            self.tokens.append(token)
            self.drafted_here.append(was_drafted)
            if was_drafted:
                self.accepted_at += [0] * (depth + 1 - len(self.accepted_at))
                self.accepted_at[depth] += 1
            if logits is not None and self.asked.logprobs is not None:
                self.logprobs.append(TokenLogprobs.of(logits[depth], token, self.asked.logprobs))
            ends = token in self.request.ends
            if self.running_text is not None and not ends and self.running_text.put(token):
                self.reason = "stop"
                return
        if self.running_text is not None:
            self.shown = self.running_text.shown
        if report.done:
            self.reason = "error" if report.failed else "stop" if self._at_end else "length"
            if report.failed:
                self.unscored = True
                self.problem = "the scores are NaN or forbid every token; check the model's weights and dtype"

    @property
    def _at_end(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.request.ends

    def fail(self, error: Exception) -> None:
        """Take note of an error that is this job's alone. Raises one of the device, which the next would meet."""
        if isinstance(error, DEVICE_ERRORS):
            raise error
        said = next(iter(str(error).splitlines()), "")
        self.reason, self.problem = "error", f"this text has failed ({type(error).__name__}: {said})"

    def end(self, reason: str) -> None:
        self.reason, self.phase = reason, Phase.ENDED
        if self.running_text is not None:
            try:
                self.running_text.end()
                self.shown = self.running_text.text
            except Exception as error:
                self.fail(error)
        self.tell()

    def tell(self) -> None:
        """Let the listener know how far it is."""
        if self.listener is not None:
            self.listener(self)
