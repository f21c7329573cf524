"""What is sent back, in OpenAI's form: whole answers, and events of those that are streamed.

Beside OpenAI's fields an answer has the `seed` that gives it again. Knows nothing of sockets.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .bodies import Body
from .job import Job, TokenLogprobs
from .worker import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have
_REASONS = {"stop": "stop", "length": "length", "error": "error", "abort": "stop"}


def problem(message: str, kind: str = "invalid_request_error", field: str | None = None, code: str | None = None):
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


@dataclass(slots=True, eq=False)
class Sent:
    """How much of a choice has been sent."""

    characters: int = 0
    tokens: int = 0
    logprobs: int = 0


@dataclass(eq=False)
class Answer:
    """The answer to a body by its `jobs`, one for each prompt and choice, in this order."""

    body: Body
    model: str
    jobs: Sequence[Job]
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Sequence[str]  # of each job, where they are echoed
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    sent: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = [Sent() for _ in self.jobs]

    def whole(self) -> dict[str, Any]:
        """The answer, of jobs that have ended."""
        made = []
        for index, job in enumerate(self.jobs):
            said, logprobs = job.text or "", self._logprobs(index, 0, len(job.tokens))
            choice: dict[str, Any] = {"index": index, "finish_reason": _REASONS[job.reason], "logprobs": logprobs}
            if self.body.chat:
                choice["message"] = {"role": "assistant", "content": said, "refusal": None}
            else:
                choice["text"] = self._echo(index) + said
            made.append(choice)
        return self._frame("", made) | {"usage": self.usage()}

    def first(self, index: int) -> dict[str, Any] | None:
        """The event that begins a choice; None where there is nothing to say yet."""
        if self.body.chat:
            delta = {"role": "assistant", "content": "", "refusal": None}
            return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        if self.body.get("echo"):
            logprobs = self._logprobs(index, 0, 0)
            choice = {"index": index, "text": self._echo(index), "logprobs": logprobs, "finish_reason": None}
            return self._event([choice])
        return None

    def more(self, index: int, progress: Progress) -> dict[str, Any] | None:
        """The event that brings a choice as far as `progress`; None where that says nothing new."""
        job, sent = self.jobs[index], self.sent[index]
        said, tokens = progress.text[sent.characters :], progress.tokens
        logprobs = self._logprobs(index, sent.logprobs, tokens, echoed=False)
        drafts = self._drafts(job, sent, progress) if self._option("include_drafts") else None
        if not said and not progress.reason and not (logprobs and tokens > sent.logprobs):
            return None
        sent.characters, sent.tokens, sent.logprobs = len(progress.text), tokens, tokens
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": None}
        if progress.reason:
            choice["finish_reason"] = _REASONS[progress.reason]
        if self.body.chat:
            choice["delta"] = {"content": said} if said else {}
        else:
            choice["text"] = said
        event = self._event([choice])
        return event if drafts is None else event | {"drafts": drafts}

    def last(self) -> dict[str, Any] | None:
        """The event with the usage, where it was asked for."""
        return self._frame("chunk", []) | {"usage": self.usage()} if self._option("include_usage") else None

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and choices; drafted tokens count as predictions, accepted or rejected."""
        n = self.body.get("n", 1)
        prompt, new = sum(len(job.request.tokens) for job in self.jobs[::n]), sum(len(job.tokens) for job in self.jobs)
        accepted = sum(job.accepted for job in self.jobs)
        details = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(job.drafted for job in self.jobs) - accepted,
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in self.jobs[::n])},
            "completion_tokens_details": details,
        }

    def _option(self, name: str) -> bool:
        return bool(self.body.get("stream_options", {}).get(name))

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        event = self._frame("chunk", choices)
        if self._option("continuous_usage_stats"):
            return event | {"usage": self.usage()}
        return event | {"usage": None} if self._option("include_usage") else event

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chat = self.body.chat
        names = ("chatcmpl-", "chat.completion" + (".chunk" if kind else "")) if chat else ("cmpl-", "text_completion")
        return {
            "id": names[0] + self.id,
            "object": names[1],
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "seed": self.jobs[0].seed,
        }

    def _echo(self, index: int) -> str:
        return self.prompts[index] if self.body.get("echo") else ""

    def _drafts(self, job: Job, sent: Sent, progress: Progress) -> dict[str, Any]:
        """The text of this event token by token, with whether each was drafted; and the steps so far."""
        pieces, start = [], sent.characters
        lengths = [] if job.running_text is None else job.running_text.lengths
        for token in range(min(progress.tokens, len(lengths))):
            end = min(lengths[token], len(progress.text))
            if end > start:
                pieces.append([progress.text[start:end], job.drafted_here[token]])
                start = end
        if start < len(progress.text):
            pieces.append([progress.text[start:], False])
        return {"pieces": pieces, "steps": job.steps, "tokens": progress.tokens, "accepted": job.accepted}

    def _logprobs(self, index: int, start: int, stop: int, echoed: bool = True) -> dict[str, Any] | None:
        """Those of new tokens `start` to `stop`, behind those of the prompt where that is echoed."""
        if self.body.logprobs is None:
            return None
        job = self.jobs[index]
        told = job.logprobs[start:stop]
        if self.body.chat:
            return {"content": [self._chat_logprob(one) for one in told], "refusal": None}
        named: list[tuple[int, TokenLogprobs | None]] = [(one.token, one) for one in told]
        offset = len(self._echo(index)) + len(self._words([one.token for one in job.logprobs[:start]]))
        if echoed and self.body.get("echo"):
            prompt = job.request.tokens
            named = [(prompt[0], None), *((one.token, one) for one in job.prompt_logprobs), *named]
            offset = 0
        words = [self._word(token) for token, _ in named]
        return {
            "tokens": words,
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, one in named],
            "top_logprobs": [None if one is None else self._likeliest(one) for _, one in named],
            "text_offset": [offset + sum(map(len, words[:number])) for number in range(len(words))],
        }

    def _likeliest(self, one: TokenLogprobs) -> dict[str, float]:
        likeliest: dict[str, float] = {}
        for token, logprob in [*one.likeliest, (one.token, one.logprob)]:
            likeliest.setdefault(self._word(token), _finite(logprob))
        return likeliest

    def _chat_logprob(self, one: TokenLogprobs) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            word = self._word(token)
            return {"token": word, "logprob": _finite(logprob), "bytes": [*word.encode()]}

        return told(one.token, one.logprob) | {"top_logprobs": [told(*each) for each in one.likeliest]}

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _words(self, tokens: list[int]) -> str:
        return "".join(map(self._word, tokens))


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
