"""The command `paceline check`: five parts over one model, within a time budget; findings are written as they come.

A model that does not fit is refused before any work. After that only the budget and Ctrl-C end the check, and both
leave the findings so far in the JSON file.
"""

import contextlib
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from .. import provenance
from ..engines.runs import reset
from ..files import write_json, write_output
from ..kernels import native
from ..target.selftest import check_kind
from ..target.weights import parameter_count, weights_form
from . import shapes
from .budget import Clock, NotHere, Task, run_tasks
from .lossless import Lossless
from .machine import machine_tasks
from .record import Check, Finding, Part
from .steps import Steps
from .subject import Subject, all_executors
from .verdict import keep_better_capture, verdict
from .worth import worth_tasks

TRAINED_STEPS = 10
SHORTEST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class ScheduledPart:
    """A part with its tasks, and its share of the whole time."""

    part: Part
    tasks: Callable[[], Iterator[Task]]
    share: float


def check(args: Namespace) -> int:
    """Run the check; returns the exit code: 1 where decoding is not lossless, or no text could be compared."""
    output = Path(args.output).resolve() if args.output else None
    executors = all_executors(args.executors)
    subject = _subject(args, executors)
    clock = Clock(args.budget, args.started)
    schedule = _schedule(subject, clock)
    result = Check(_about(args, subject), [scheduled.part for scheduled in schedule])
    try:
        with warnings.catch_warnings(), _stoppable() as stopped:
            warnings.simplefilter("ignore")  # of other packages
            run(schedule, clock, result, output, stopped)
    except BaseException:
        result.interrupted = True
        raise
    finally:
        sentence = verdict(result)
        if output:
            write_json(output, result.as_dict(sentence))
        if args.markdown:
            write_output(args.markdown, result.markdown(sentence))
        reset(subject.model)
    print(f"\n{sentence}")
    keep_better_capture(subject.device, result)
    return 0 if result.compared and not result.failed else 1


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the block. Yields a list of their numbers, as a library may swallow the exception."""
    stopped: list[int] = []

    def stop(number: int, frame) -> None:
        stopped.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(schedule: list[ScheduledPart], clock: Clock, result: Check, output: Path | None, stopped: list[int]) -> None:
    """Run the parts one after the other and print each at its end; every finding is written to the JSON file at once.
    Raises KeyboardInterrupt once `stopped` holds a signal."""
    shares = sum(scheduled.share for scheduled in schedule)
    for scheduled in schedule:
        begun = time.perf_counter()
        clock.begin(scheduled.share / shares)
        shares -= scheduled.share
        for finding in run_tasks(scheduled.tasks(), clock):
            scheduled.part.findings.append(finding)
            scheduled.part.seconds = time.perf_counter() - begun
            if output:
                write_json(output, result.as_dict("not finished"))
            if stopped:
                raise KeyboardInterrupt
        print(result.text(scheduled.part), flush=True)


def _schedule(subject: Subject, clock: Clock) -> list[ScheduledPart]:
    steps = Steps(subject, clock)
    return [
        ScheduledPart(Part("machine", "Machine"), lambda: machine_tasks(subject), 0.04),
        ScheduledPart(Part("lossless", "Lossless", must_hold=True), lambda: Lossless(subject, clock).tasks(), 0.62),
        ScheduledPart(Part("steps", "Steps"), steps.tasks, 0.24),
        ScheduledPart(Part("worth", "Worth it"), lambda: worth_tasks(steps), 0.01),
        ScheduledPart(Part("training", "Training"), lambda: _training_tasks(subject), 0.09),
    ]


def _training_tasks(subject: Subject) -> Iterator[Task]:
    labels = {"what": f"{TRAINED_STEPS} steps of heads, the target online"}

    def train() -> list[Finding]:
        if index := subject.device.index:
            raise NotHere(f"accelerate trains on the first GPU; CUDA_VISIBLE_DEVICES={index} makes it this one")
        speed, loss = import_module("...training.probe", __package__).heads_speed(subject.model, TRAINED_STEPS)
        return [Finding(labels, figures={"tokens_per_second": speed, "loss": loss})]

    yield Task(labels, train)


def _subject(args: Namespace, executors: list[str]) -> Subject:
    """Load or make the model that the options name, after printing and checking the memory that it needs."""
    device, label = _device(args.device), args.shape
    if args.weights != "16" and args.model is None:
        raise ValueError(f"--weights {args.weights} needs a model that is in such blocks; name it with --model")
    if args.model is not None or args.config is not None:
        label = args.model if args.model is not None else args.config
        config = shapes.read_config(label, args.trust_remote_code)
    else:
        config = shapes.shape_config(label)
    text = config.get_text_config()
    if (context := getattr(text, "max_position_embeddings", None) or SHORTEST_CONTEXT) < SHORTEST_CONTEXT:
        raise ValueError(f"{label} has a context of {context} tokens and the check needs {SHORTEST_CONTEXT}")
    published = (text.dtype or torch.float32) if args.model is not None else None
    dtype = shapes.settled_dtype(args.dtype, device, published)
    if args.weights == "16":
        needed = shapes.weight_bytes(config, dtype, args.trust_remote_code)
        print(shapes.check_memory(Path(label).name, needed, dtype, device), file=sys.stderr)
    if args.model is not None:
        model = shapes.named_model(args.model, args.dtype, device, args.trust_remote_code, args.weights)
    else:
        model = shapes.random_model(config, dtype, device, args.trust_remote_code)
    check_kind(model)
    if device.type == "cpu":
        native.prepare()  # may compile for some seconds, which must not be interrupted
    make_drafter = import_module("...drafters.untrained", __package__).untrained
    return Subject(Path(label).name, model, executors, make_drafter)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is neither a CPU nor a CUDA device, which are what can be checked")
    return device


def _about(args: Namespace, subject: Subject) -> dict:
    weights = weights_form(subject.model) or ("its own" if args.model is not None else "random")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": provenance.command(),
        "commit": provenance.git_commit(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "subject": {
            "name": subject.name, "weights": weights, "dtype": subject.dtype_name, "device": str(subject.device),
            "parameters": parameter_count(subject.model),
            "attention": subject.model.config.get_text_config()._attn_implementation,
        },
        "budget": args.budget,
    }  # fmt: skip
