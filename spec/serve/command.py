"""`paceline serve`: one model behind an OpenAI-compatible endpoint, until a signal ends it.

SIGTERM or Ctrl-C: no more requests, those under way get `GRACE` seconds, exit code 0; a second one ends it at once.
Where the engine fails, or is stuck, the server ends with exit code 1. What needs the extra `serve` is imported by the
functions that need it.
"""

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from ... import __version__
from ..console import waiting
from ..engines import runs
from ..engines.executors import choose
from ..inputs.numbers import whole_number
from ..plan.store import read_shape, serving_path
from ..proposal import NoDrafter
from ..stream.streamer import prompt_chunk, streamer_of
from ..target.load import context_length
from ..target.selftest import attach
from ..tree import TreeShape
from .gears import Gears, sizes
from .lanes import Lane
from .planner import RowPlanner, Times, candidates, expected_times, measured, promising
from .prefixes import KeptPrefixes, can_resume
from .row_sampler import EVERY, KEPT_KINDS, KINDS
from .scheduler import Scheduler
from .worker import Worker, in_passing_thread

GRACE = 30.0  # seconds for texts that are under way
CLOSING = 10.0  # seconds for the engine to end its turn
KEY = "PACELINE_API_KEY"  # in the environment: a key, or several with commas between
LOCAL = ("127.0.0.1", "localhost", "::1")
CHUNK = {"cpu": 128, "cuda": 512}  # prompt tokens between two steps
ROOM = 2048  # tokens of a text, where the context is longer


def serve(args: Namespace) -> int:
    keys = args.api_key or [key for key in os.environ.get(KEY, "").split(",") if key]
    if not all(keys):
        raise ValueError("--api-key is empty, which everybody could send; give a key of some length, or leave it out")
    if args.host not in LOCAL and not keys and not args.insecure:
        raise ValueError(
            f"--host {args.host} would serve everybody who can reach it; set --api-key, or --insecure if that is meant"
        )
    try:
        import uvicorn  # noqa: F401

        from .app import make_app
        from .figures import Figures
    except ImportError as error:
        raise ValueError(f"paceline serve needs {error.name}; pip install 'paceline[serve]' brings it") from error
    from ..cli.commands import load
    from .serving import Serving

    figures = Figures(args.name or Path(args.model).name)

    def prepare() -> tuple[Serving, Any]:
        model, tokenizer, drafter = load(args)
        worker, limits, about = assemble(args, model, tokenizer, drafter, figures)
        return Serving(model, tokenizer, worker, limits, figures, keys, about), worker

    try:
        serving, worker = in_passing_thread(prepare)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)  # an exit would take torch away from the thread, which is loading still
    worker.start()
    try:
        return asyncio.run(_run(serving, make_app(serving), args.host, args.port))
    finally:
        _end(worker)


def _end(worker: Any) -> None:
    """End the engine; the process too, with exit code 1, where the engine does not end."""
    if not worker.close(CLOSING):
        print(
            f"paceline: the engine has not ended its turn within {CLOSING:g} s; the process ends without it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)  # an exit would wait for what the thread holds


def assemble(args: Namespace, model: Any, tokenizer: Any, drafter: Any, figures: Any) -> tuple[Any, Any, dict]:
    """The worker, the limits, and what `/version` tells."""
    from .serving import Limits

    attach(model)
    drafting = drafter or NoDrafter()
    rows, context = whole_number("--max-rows", args.max_rows, 1), context_length(model)
    room = min(args.room or ROOM, context or args.room or ROOM)
    if args.room and context and args.room > context:
        raise ValueError(f"--room {args.room} is more than the model's context of {context}; give at most that")
    usual = CHUNK.get(model.device.type, 512) if streamer_of(model) is None else prompt_chunk(model)
    chunk = args.prefill_chunk or usual
    executor = choose(args.executor, model, 0, capturable=True, compiled_before=False)
    gears = _gears(model, drafting, room, rows, chunk, executor)
    try:
        plan, learn = _plan(args.tree, gears)
    except ValueError as error:
        if args.executor != "auto" or executor == "eager":
            raise
        print(f"{error} (which runs now)", file=sys.stderr)
        runs.reset(model)
        gears = _gears(model, drafting, room, rows, chunk, "eager")
        plan, learn = _plan(args.tree, gears)
    lanes = [Lane(gears.lane_engine(1, plan(1)), chunk) for _ in range(2)]
    prefixes = None
    if args.prefix_megabytes and can_resume(lanes[0].engine, drafting.traits.remembers):
        prefixes = KeptPrefixes(model, drafting, chunk, args.prefix_megabytes, figures.prefix)

    def on_step(arrival: Any, gear: Any) -> None:
        figures.step(arrival, gear)
        learn(arrival, gear)
        figures.shifts = gears.shifts

    scheduler = Scheduler(gears, lanes, plan, prefixes, on_step)
    limits = Limits(room, min(args.max_tokens, room), args.queue, args.queue_seconds)
    about = {"version": __version__, "drafter": drafting.name, "rows": rows, "room": room, "executor": gears.executor}
    return Worker(scheduler), limits, about


def _gears(model: Any, drafter: Any, room: int, rows: int, chunk: int, executor: str) -> Gears:
    kinds, rare = (KINDS, ()) if executor == "eager" else (KEPT_KINDS, (EVERY,))
    return Gears(model, drafter, room, rows, chunk, executor, lasting=True, kinds=kinds, rare=rare)


def _plan(tree: str | None, gears: Gears) -> tuple[Any, Any]:
    """The tree for a number of rows, and what is to be told of each step."""
    model, drafter, eager = gears.model, gears.drafter, gears.executor == "eager"
    trees = candidates(drafter, few=streamer_of(model) is not None)  # steps of streamed weights take long
    named = None if tree in (None, "auto") else read_shape(tree, drafter)
    if named is not None or len(trees) == 1:
        fixed = named or trees[0]
        if not eager:
            gears.make(product(sizes(gears.most), [fixed]))
        return lambda rows: fixed, lambda arrival, gear: None
    pairs = list(product(sizes(gears.most), trees))

    def times_of(timed: Gears, pairs: Iterable[tuple[int, TreeShape]]) -> Times:
        with waiting(f"timing {timed.executor} steps, by rows and tree"):
            return measured(timed, pairs, serving_path(model, drafter, timed.executor, timed.room))

    def planner_by(times: Times) -> RowPlanner:
        return RowPlanner(times, beside=bool(drafter.traits.parts))

    if not eager:
        without = [(rows, shape) for rows, shape in pairs if len(shape) == 1]
        gears.make(without)
        eager_times = times_of(_gears(model, drafter, gears.room, gears.most, gears.chunk, "eager"), pairs)
        pairs = promising(planner_by(expected_times(eager_times, times_of(gears, without))))
        gears.make(pairs)
    planner = planner_by(times_of(gears, pairs))

    def learn(arrival: Any, gear: Any) -> None:
        committed = [report for report in arrival.reports.values() if report.committed]
        planner.learn(gear.shape, committed)

    return planner, learn


async def _run(serving: Any, app: Any, host: str, port: int) -> int:
    server = make_server(serving, app, host, port)
    watching = asyncio.create_task(_watch(server, serving))
    await server.serve()
    watching.cancel()
    return 1 if serving.status == "failed" else 0


async def _watch(server: Any, serving: Any) -> None:
    """Tell where the server is once it listens, and end it where the engine has failed."""
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"serving {serving.name} at http://{where}:{port}/v1 (a page to try it at /)", file=sys.stderr, flush=True)
    while serving.status != "failed":
        await asyncio.sleep(0.5)
    print(f"paceline: the engine has failed: {serving.worker.failure or 'it is stuck'}", file=sys.stderr, flush=True)
    server.should_exit = server.force_exit = True


def make_server(serving: Any, app: Any, host: str, port: int) -> Any:
    """uvicorn's server, which lets what is under way end."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if serving.draining:  # the second signal
                self.should_exit = self.force_exit = True
                return
            serving.draining = True
            loop.call_soon_threadsafe(lambda: draining.append(loop.create_task(self._drain())))

        async def _drain(self) -> None:
            await serving.drain(GRACE)
            self.should_exit = True

    loop, draining = asyncio.get_running_loop(), list[asyncio.Task]()  # a task is kept, lest it be collected
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5, lifespan="off"
    )
    return Server(config)
