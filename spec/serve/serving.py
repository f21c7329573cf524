"""What the endpoints share: the model's tokenizer, the worker, the limits, and the requests under way.

Knows nothing of HTTP but its status codes.
"""

import asyncio
import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.content import Unfit
from ..prompts import templated_ids
from ..proposal import parts_of
from ..target.load import end_ids
from .answers import Answer
from .bodies import BadBody, Body
from .figures import Figures
from .job import Job, Phase
from .many import make_job
from .text_request import TextRequest
from .worker import Reader, Worker

SHORT_ANSWER = 16  # new tokens of a completion that does not say how many, as OpenAI has it


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes."""

    room: int  # tokens of a text, prompt and answer
    new_tokens: int = 512  # of an answer in a chat whose request does not say how many
    queue: int = 64  # jobs that wait
    queue_seconds: float = 60.0
    body_bytes: int = 4 << 20


class Serving:
    """One model, served under `name` to those who have one of `keys` (none: to everybody)."""

    closing = "the server is closing; try again later"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        worker: Worker,
        limits: Limits,
        figures: Figures,
        keys: Sequence[str] = (),
        about: dict[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.worker, self.limits = model, tokenizer, worker, limits
        self.figures, self.keys, self.name, self.about = figures, tuple(keys), figures.model, about or {}
        self.looks_up = any(part.traits.kind == "ngram" for part in parts_of(worker.scheduler.gears.drafter))
        self.draining = False
        self.under_way: set[Reader] = set()
        # A tokenizer is not made for several threads at once; the worker's decodes with the one that it has.
        self._encoder, self._encoding = copy.deepcopy(tokenizer), threading.Lock()

    @property
    def status(self) -> str:
        if self.worker.failure is not None or self.worker.stuck:
            return "failed"
        return "closing" if self.draining else "ok"

    def check_open(self) -> None:
        """Raise BadBody where no request is taken any more."""
        if self.status == "failed":
            raise BadBody(None, "the engine has failed; the server must be started again", 503)
        if self.draining:
            raise BadBody(None, self.closing, 503)

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise BadBody(
                "model", f"model {name[:80]!r} is not served here; ask for {self.name!r}", 404, "model_not_found"
            )

    def described(self) -> dict[str, Any]:
        room = self.limits.room
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "paceline", "max_model_len": room}

    def answer(self, body: Body, tenant: str) -> Answer:
        """The jobs of a request. Raises BadBody for one that cannot be served."""
        self.check_name(body.get("model", self.name))
        with self._encoding:
            prompts = self._prompts(body)
            n, seed = body.get("n", 1), body.get("seed", int(torch.randint(2**31, ())))
            if len(prompts) * n > self.limits.queue:
                field = "n" if n > 1 else "prompt"
                said = f"the request asks for {len(prompts) * n} texts at once; ask for {self.limits.queue} at most"
                raise BadBody(field, said)
            if body.get("prediction") and not self.looks_up:
                said = (
                    "prediction is for prompt lookup, which does not draft here; serve with --drafter ngram or X+ngram"
                )
                raise BadBody("prediction", said)
            jobs = [self._job(body, ids, seed, choice, tenant) for ids in prompts for choice in range(n)]
            echoed = [self._encoder.decode(ids) if body.get("echo") else "" for ids in prompts for _ in range(n)]
        return Answer(body, self.name, jobs, self.tokenizer, echoed)

    def _prompts(self, body: Body) -> list[list[int]]:
        if not body.chat:
            return [each if isinstance(each, list) else self._encoder(each)["input_ids"] for each in body.get("prompt")]
        if not self.tokenizer.chat_template:
            raise BadBody("messages", "the model has no chat template; use /v1/completions")
        try:
            return [templated_ids(self._encoder, body.get("messages"))]
        except Unfit as error:
            raise BadBody("messages", str(error)) from error

    def _job(self, body: Body, ids: list[int], seed: int, choice: int, tenant: str) -> Job:
        where = "messages" if body.chat else "prompt"
        left, asked = self.limits.room - len(ids), body.new_tokens
        usual = self.limits.new_tokens if body.chat else SHORT_ANSWER
        new_tokens = min(usual, max(left, 1)) if asked is None else asked
        if new_tokens > left:
            raise BadBody(
                where,
                f"{where} of {len(ids)} tokens and {body.limit_name}={new_tokens} are together more than the "
                f"{self.limits.room} that a text has room for here; shorten one of them",
                code="context_length_exceeded",
            )
        logprobs = body.logprobs
        scored = logprobs if body.get("echo") else None
        request = TextRequest(
            prompt=ids,
            max_new_tokens=new_tokens,
            seed=seed,
            choice=choice,
            end_ids=body.ends(end_ids(self.model)),
            logprobs=logprobs,
            prompt_logprobs=0 if scored is None and new_tokens == 0 else scored,
            prediction=self._encoder(body.get("prediction", ""), add_special_tokens=False)["input_ids"],
            tenant=tenant,
            **body.sampling,
        )
        try:
            return make_job(self.model, self.tokenizer, request)
        except ValueError as error:
            raise BadBody(where if "prompt" in str(error) else None, str(error)) from error

    def submit(self, answer: Answer) -> list[Reader]:
        """Queue the jobs of an answer. Raises BadBody where too many wait."""
        self.check_open()
        if self.waiting + len(answer.jobs) > self.limits.queue:
            raise BadBody(None, f"{self.waiting} requests wait already; try again later", 429, "rate_limit_exceeded")
        loop = asyncio.get_running_loop()
        readers = [Reader(job, loop) for job in answer.jobs]
        self.under_way |= {*readers}
        for reader in readers:
            self.worker.submit(reader.job)
        return readers

    def cancel(self, readers: Sequence[Reader]) -> None:
        """Forget jobs: those that have not ended are cancelled."""
        for reader in readers:
            if reader in self.under_way:
                self.under_way.remove(reader)
                self.worker.cancel(reader.job)
                if not reader.job.reason:
                    self.figures.aborted()
                else:
                    self.figures.ended(reader.job, reader.begun, reader.read, reader.first_token, reader.ended)

    @property
    def waiting(self) -> int:
        return sum(reader.job.phase is Phase.WAITING for reader in self.under_way)

    def refresh(self) -> None:
        """Bring the gauges up to date."""
        jobs = [reader.job for reader in self.under_way]
        running = [job for job in jobs if job.phase is Phase.RUNNING]
        gears = self.worker.scheduler.gears
        held = sum(len(job.request.tokens) + len(job.tokens) for job in running)
        self.figures.set("vllm:num_requests_running", len(running))
        self.figures.set("vllm:num_requests_waiting", sum(job.phase in ("waiting", "reading") for job in jobs))
        self.figures.set("vllm:kv_cache_usage_perc", held / (gears.most * gears.room))

    async def drain(self, seconds: float) -> None:
        """Take no more requests, refuse those that wait, and let the others end for so long."""
        self.draining = True
        for reader in [*self.under_way]:
            if reader.job.phase is Phase.WAITING:
                self.worker.cancel(reader.job)
        for _ in range(int(seconds * 20)):
            if not self.under_way or not self.worker.alive:
                break
            await asyncio.sleep(0.05)
        for reader in [*self.under_way]:
            self.worker.cancel(reader.job)
        await asyncio.sleep(0.1)  # for them to be told
