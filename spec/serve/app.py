"""The server's endpoints. Knows nothing of models: what is asked for goes to the worker, what comes back is sent.

A request is read, checked, and handed over as jobs; a client that has gone cancels them, in whatever state they are.
Nothing that was asked or answered is ever logged.
"""

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .answers import Answer, problem
from .bodies import BadBody, Body
from .job import Phase
from .json_text import read_json
from .serving import Serving
from .worker import Progress, Reader

_log = logging.getLogger(__name__)

PING = 15.0  # seconds of silence after which a comment says that the connection lives
STALLED = 60.0  # seconds for which a client may take nothing
FAILED = "the server has failed to answer this request"
GONE = 499  # the status of an answer that nobody waits for
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(serving: Serving) -> Starlette:
    """The ASGI application."""

    def endpoint(function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """With the key checked, and a failure told. A handler of all exceptions would not do: Starlette raises what it
        has answered once more, and uvicorn logs that with its message, in which there may be what was asked."""

        async def guarded(request: Request) -> Response:
            try:
                _check_key(serving.keys, request)
                return await function(request)
            except (BadBody, HTTPException):
                raise
            except Exception as error:
                return JSONResponse(_failed("a request", error), 500)

        return guarded

    async def chat(request: Request) -> Response:
        return await _answer(serving, request, chat=True)

    async def complete(request: Request) -> Response:
        return await _answer(serving, request, chat=False)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [serving.described()]})

    async def model(request: Request) -> Response:
        serving.check_name(request.path_params["name"])
        return JSONResponse(serving.described())

    async def metrics(request: Request) -> Response:
        return Response(serving.figures.text(serving.refresh), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": serving.status}, 200 if serving.status == "ok" else 503)

    async def version(request: Request) -> Response:
        return JSONResponse(serving.about)

    async def page(request: Request) -> Response:
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    routes = [
        Route("/v1/chat/completions", endpoint(chat), methods=["POST"]),
        Route("/v1/completions", endpoint(complete), methods=["POST"]),
        Route("/v1/models", endpoint(models)),
        Route("/v1/models/{name:path}", endpoint(model)),
        Route("/metrics", endpoint(metrics)),
        Route("/version", endpoint(version)),
        Route("/health", health),
        Route("/", page),
    ]
    handlers: dict[Any, Any] = {BadBody: _bad_body, HTTPException: _http_error}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _bad_body(request: Request, error: BadBody) -> Response:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kinds = kind.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(problem(str(error), kinds, error.field, error.code), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse(
        problem(f"{request.method} {request.url.path}: {error.detail}"), error.status_code, error.headers
    )


def _failed(what: str, error: Exception) -> dict[str, Any]:
    """What is told of a failure; the log has the kind of the error alone."""
    _log.error("%s has failed (%s)", what, type(error).__name__)
    return problem(FAILED, "server_error")


def _check_key(keys: Sequence[str], request: Request) -> None:
    given = request.headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer ")
    # All of them, so that time tells nothing; keys from a command line may have bytes that are no text.
    alike = [hmac.compare_digest(given, key.encode(errors="surrogateescape")) for key in keys]
    if keys and not any(alike):
        raise BadBody(None, "there is no such API key; send one as Authorization: Bearer KEY", 401, "invalid_api_key")


def _tenant(request: Request) -> str:
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()[:16]


async def _read(request: Request, most: int) -> bytes:
    """The body."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise BadBody(None, f"the body has more than {most:,} bytes; send less", 413)
    return bytes(data)


async def _answer(serving: Serving, request: Request, chat: bool) -> Response:
    serving.check_open()
    try:
        data, tenant = await _read(request, serving.limits.body_bytes), _tenant(request)
        # A long body takes a while, in which others are answered.
        answer = await asyncio.to_thread(lambda: serving.answer(Body.read(read_json(data), chat), tenant))
    except ClientDisconnect:
        return Response(status_code=GONE)
    readers = serving.submit(answer)
    gone: asyncio.Future = asyncio.create_task(_disconnected(request))
    handed_on = False  # to the stream
    try:
        if not await _before(gone, _begun(serving, readers)):
            return Response(status_code=GONE)
        if answer.body.get("stream"):
            handed_on = True
            return EventStream(serving, answer, readers, gone)
        if not await _before(gone, _all_ended(readers)):
            return Response(status_code=GONE)
        failed = next((job for job in answer.jobs if job.reason in ("error", "abort")), None)
        if failed is not None:
            raise BadBody(None, failed.problem or serving.closing, 503 if failed.reason == "abort" else 500)
        return JSONResponse(answer.whole())
    finally:
        if not handed_on:
            gone.cancel()
            serving.cancel(readers)


async def _before(gone: asyncio.Future, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, unless the client has `gone` before it is done; whether it is done."""
    task: asyncio.Future = asyncio.ensure_future(work)
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
        task.cancel()
        return False
    await task
    return True


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _begun(serving: Serving, readers: Sequence[Reader]) -> None:
    """Wait until the first job leaves the queue. Raises BadBody where that takes too long, or it never will."""
    if await readers[0].more(serving.limits.queue_seconds) is None and readers[0].job.phase is Phase.WAITING:
        raise BadBody(None, f"the request waited for {serving.limits.queue_seconds:g} s; try again later", 503)
    readers[0].changed.set()  # it is for whoever reads on
    if readers[0].job.reason == "abort":
        raise BadBody(None, serving.closing, 503)


async def _all_ended(readers: Sequence[Reader]) -> None:
    for reader in readers:
        while not reader.progress.reason:
            await reader.more(PING)


class EventStream(Response):
    """An answer as server-sent events, until it is whole or the client has `gone`."""

    def __init__(self, serving: Serving, answer: Answer, readers: Sequence[Reader], gone: asyncio.Future):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.raw_headers[[name for name, _ in self.raw_headers].index(b"content-length")]
        self.serving, self.answer, self.readers, self.gone = serving, answer, readers, gone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending: asyncio.Future = asyncio.create_task(self._send(send))
        try:
            await asyncio.wait({sending, self.gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(TimeoutError):  # of a client that takes nothing
                    sending.result()
        finally:
            sending.cancel()
            self.gone.cancel()
            self.serving.cancel(self.readers)

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            message = {"type": "http.response.body", "body": event.encode(), "more_body": True}
            await asyncio.wait_for(send(message), STALLED)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()  # None: a choice has ended
        pumps = [asyncio.create_task(self._pump(index, queue)) for index in range(len(self.readers))]
        open_choices = len(pumps)
        try:
            while open_choices:
                try:
                    event = await asyncio.wait_for(queue.get(), PING)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if event is None:
                    open_choices -= 1
                else:
                    yield _event(event)
            try:
                last = self.answer.last()
            except Exception as error:
                last = _failed("the end of an answer", error)
            if last is not None:
                yield _event(last)
            yield "data: [DONE]\n\n"
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(self, index: int, queue: asyncio.Queue) -> None:
        """Put the events of one choice into the queue as they come."""
        reader, begun = self.readers[index], False
        while True:
            progress = await reader.more(PING)
            if progress is None:
                continue
            try:
                events = self._told(index, progress, not begun)
            except Exception as error:  # else the client would wait for ever
                self.serving.cancel([reader])
                queue.put_nowait(_failed("an event", error))
                queue.put_nowait(None)
                return
            begun = begun or bool(progress.tokens)
            for event in events:
                queue.put_nowait(event)
            if progress.reason:
                queue.put_nowait(None)
                return

    def _told(self, index: int, progress: Progress, first: bool) -> list[dict[str, Any]]:
        """The events of one choice that bring it as far as `progress`; `first`: where there were no tokens before."""
        if progress.reason in ("error", "abort"):
            return [problem(self.readers[index].job.problem or self.serving.closing, "server_error")]
        begins = first and (progress.tokens or progress.reason)
        events = [self.answer.first(index) if begins else None, self.answer.more(index, progress)]
        return [event for event in events if event is not None]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
