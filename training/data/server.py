"""Answers from an OpenAI-compatible server, for targets too large to run here.

Several conversations run at a time, and each request is retried with growing pauses. When the server is gone for good,
finished answers are kept and the others are recorded as failed, for the next run to retry. Standard library only.
"""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed

from .answers import Conversation, Sampling
from .ledger import Job, Ledger

TRIES = 5
GONE = 3  # conversations in a row that must fail before the server counts as gone


class Refused(ValueError):
    """The server's answer is final: asking again would not help."""


class Server:
    """`url` is the base that ends in /v1, as OpenAI clients have it; OPENAI_API_KEY is sent where it is set."""

    def __init__(self, url: str, model: str, sampling: Sampling, timeout: float = 600.0, pause: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--server {url!r} is no URL; give one like http://localhost:8000/v1")
        self.url, self.model, self.sampling = url.rstrip("/") + "/chat/completions", model, sampling
        self.timeout, self.pause = timeout, pause
        self.lost = 0  # conversations in a row that the server did not answer
        self.lock = threading.Lock()

    def converse(self, job: Job) -> dict:
        """The record of one job. Raises OSError or ValueError where the server does not answer it."""
        if self.lost >= GONE:
            raise OSError("not tried, because the server no longer answers")
        conversation, tokens = Conversation.begin(job), 0
        try:
            for number in range(len(job.prompt.turns)):
                if number:
                    conversation.messages.append({"role": "user", "content": job.prompt.turns[number]})
                choice, used = self._ask(conversation.messages, job)
                conversation.messages.append({"role": "assistant", "content": choice["message"]["content"]})
                conversation.finished = choice.get("finish_reason") == "stop"
                tokens += used
                if not conversation.finished:
                    break
        except OSError:
            with self.lock:
                self.lost += 1
            raise
        self.lost = 0
        record = conversation.record(self.sampling) | {"tokens": tokens}
        del record["token_ids"]  # a server speaks of text
        return record

    def _ask(self, messages: list[dict], job: Job) -> tuple[dict, int]:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": job.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": job.seed % 2**31,
        }
        for attempt in range(TRIES):
            try:
                answer = self._post(body)
                break
            except OSError:
                if attempt == TRIES - 1:
                    raise
                time.sleep(self.pause * 2**attempt)
        try:
            choice = answer["choices"][0]
            if not isinstance(choice["message"]["content"], str):
                raise TypeError("the answer holds no text")
            return choice, int(answer["usage"]["completion_tokens"])
        except (KeyError, IndexError, TypeError) as error:
            raise Refused(f"no chat completion came back ({type(error).__name__}: {error})") from error

    def _post(self, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise Refused(f"HTTP {error.code}: {error.read(200).decode(errors='replace')}") from error
            raise OSError(f"HTTP {error.code}") from error
        except (json.JSONDecodeError, http.client.HTTPException) as error:
            raise OSError(f"half an answer ({error})") from error


def answer_by(server: Server, jobs: list[Job], ledger: Ledger, at_once: int) -> None:
    """Answer all jobs by `server`, `at_once` at a time."""
    pool = ThreadPoolExecutor(at_once)
    asked = {pool.submit(server.converse, job): job for job in jobs}
    try:
        for future in as_completed(asked):
            try:
                record = future.result()
            except Refused as error:
                ledger.fail(asked[future].id, f"refused: {error}")
            except OSError as error:
                ledger.fail(asked[future].id, f"server: {error}")
            else:
                ledger.progress(record["tokens"])
                ledger.add(record)
            if ledger.full:
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
