"""The command `paceline check`: five parts over one model, within a budget, written down as they are found.

What is at stake is refused before any work: a model that does not fit, an output that cannot be written. After that
nothing stops the check but its budget and Ctrl-C, and both leave what was found so far in the JSON file.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from .. import provenance
from ..captures import keep_verdict
from ..runs import reset
from . import shapes
from .budget import Clock, Task, run_tasks
from .lossless import Lossless
from .machine import machine_tasks
from .record import FAILS, HOLDS, NOT_HERE, Check, Finding, Part, write_json
from .steps import Steps
from .subject import Subject, all_executors
from .worth import worth_tasks

TRAINED_STEPS = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """A part with its tasks, and its share of the time that is left when it begins."""

    part: Part
    tasks: Callable[[], Iterator[Task]]
    share: float


def check(args) -> int:
    """Check what `args` name; 1 where a promise of losslessness does not hold."""
    outputs = [Path(path) for path in (args.output, args.markdown) if path and path != "-"]
    _check_outputs(outputs)
    executors = all_executors(args.executors)
    subject = _subject(args, executors)
    clock = Clock(args.budget, args.started)
    plans = _plans(subject, clock)
    result = Check(_about(args, subject), [plan.part for plan in plans])
    output = Path(args.output) if args.output else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages; what matters here is found and said
            run(plans, clock, result, output)
    except KeyboardInterrupt:
        result.interrupted = True
        raise
    finally:
        sentence = verdict(result)
        if output:
            write_json(output, result.as_dict(sentence))
        if args.markdown:
            _write_markdown(args.markdown, result.markdown(sentence))
        reset(subject.model)
    _keep_better_capture(subject, plans)
    print(f"\n{sentence}")
    return 1 if result.failed else 0


def run(plans: list[Plan], clock: Clock, result: Check, output: Path | None) -> None:
    """Run the parts one after the other and print each as it ends; every finding is in the JSON file at once."""
    shares = sum(plan.share for plan in plans)
    for plan in plans:
        begun = time.perf_counter()
        clock.begin(plan.share / shares)
        shares -= plan.share
        for finding in run_tasks(plan.tasks(), clock):
            plan.part.findings.append(finding)
            plan.part.seconds = time.perf_counter() - begun
            if output:
                write_json(output, result.as_dict("not finished"))
        print(result.text(plan.part), flush=True)


def _plans(subject: Subject, clock: Clock) -> list[Plan]:
    steps = Steps(subject, clock)
    return [
        Plan(Part("machine", "Machine"), lambda: machine_tasks(subject), 0.04),
        Plan(Part("lossless", "Lossless", must_hold=True), lambda: Lossless(subject, clock).tasks(), 0.62),
        Plan(Part("steps", "Steps"), steps.tasks, 0.24),
        Plan(Part("worth", "Worth it"), lambda: worth_tasks(steps), 0.01),
        Plan(Part("training", "Training"), lambda: _training_tasks(subject), 0.09),
    ]


def _training_tasks(subject: Subject) -> Iterator[Task]:
    what = {"what": f"{TRAINED_STEPS} steps of heads, the target online"}

    def train() -> list[Finding]:
        speed, loss = import_module("...training.probe", __package__).heads_speed(subject.model, TRAINED_STEPS)
        return [Finding(what, figures={"tokens_per_second": speed, "loss": loss})]

    yield Task(what, train)


def _subject(args, executors: list[str]) -> Subject:
    """The model that the options name. Says first what memory it needs."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from error
    if args.model or args.config:
        config = shapes.read_config(args.model or args.config, args.trust_remote_code)
    else:
        config = shapes.shape_config(args.shape)
    published = (config.get_text_config().dtype or torch.float32) if args.model else None
    dtype = shapes.settled_dtype(args.dtype, device, published)
    label = args.model or args.config or args.shape
    needed = shapes.weight_bytes(config, dtype, args.trust_remote_code)
    print(shapes.check_memory(Path(label).name, needed, dtype, device), file=sys.stderr)
    if args.model:
        model = shapes.named_model(args.model, args.dtype, device, args.trust_remote_code)
    else:
        model = shapes.random_model(config, dtype, device, args.trust_remote_code)
    make_drafter = import_module("...drafters.untrained", __package__).untrained
    return Subject(Path(label).name, model, executors, lambda kind, target: make_drafter(kind, target))


def _about(args, subject: Subject) -> dict:
    weights = "its own" if args.model else "random"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": provenance.command(),
        "commit": provenance.git_commit(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "subject": {
            "name": subject.name, "weights": weights, "dtype": subject.dtype_name, "device": str(subject.device),
            "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
            "attention": subject.model.config.get_text_config()._attn_implementation,
        },
        "budget": args.budget,
    }  # fmt: skip


def verdict(result: Check) -> str:
    """The last line: whether the promises hold, and what speculation is worth."""
    findings = {part.name: part.findings for part in result.parts}
    failing = [part.title for part in result.parts if part.verdict == FAILS]
    counts = {kind: sum(f.verdict == kind for f in findings["lossless"]) for kind in (HOLDS, FAILS, NOT_HERE)}
    if counts[FAILS]:
        first = next(f for f in findings["lossless"] if f.verdict == FAILS)
        named = ", ".join(str(value) for value in first.what.values())
        return f"NOT lossless here: {counts[FAILS]} of {sum(counts.values())} checks fail, the first is {named}."
    said = "No drafted text was compared with plain decoding"
    if any(f.verdict == HOLDS and f.what.get("promise") == "same text" for f in findings["lossless"]):
        said = f"Lossless here: {counts[HOLDS]} of {sum(counts.values())} checks hold, the others are not here"
    likely = [f for f in findings["worth"] if f.what.get("accepted") == "70%"]
    gains = [f.figures["speedup"] for f in likely if "speedup" in f.figures]
    worth = "" if not gains else (
        f"; at 70% acceptance a level the best tree is {max(gains):.2f} times as fast as plain decoding"
        if max(gains) > 1 else "; at 70% acceptance a level speculation does not pay here"
    )  # fmt: skip
    trouble = f"; {' and '.join(failing)} failed" if failing else ""
    return f"{said}{worth}{trouble}."


def _keep_better_capture(subject: Subject, plans: list[Plan]) -> None:
    """On a GPU, keep which captured step is the better one, where both were checked and timed."""
    parts = {plan.part.name: plan.part for plan in plans}
    eager, compiled = "cuda_graph_eager", "cuda_graph_compiled"
    texts = [f for f in parts["lossless"].findings if f.what.get("executor") == compiled]
    seconds = {
        (f.what["executor"], f.what["nodes"]): f.figures["step_seconds"]
        for f in parts["steps"].findings
        if f.what.get("rows") == 1 and "step_seconds" in f.figures
    }
    both = [n for name, n in seconds if name == compiled and (eager, n) in seconds]
    if both and any(f.verdict == HOLDS for f in texts):
        right = all(f.verdict != FAILS for f in texts)
        faster = all(seconds[compiled, nodes] < seconds[eager, nodes] for nodes in both)
        keep_verdict(subject.device, right and faster)


def _check_outputs(outputs: list[Path]) -> None:
    """Refuse, before any work, two outputs in one file and a place that cannot be written."""
    if len(outputs) > len({path.resolve() for path in outputs}):
        raise ValueError(f"-o and --markdown both name {outputs[0]}; give two files")
    for path in outputs:
        try:
            existed = path.exists()
            open(path, "a").close()
            if not existed:
                path.unlink()
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); choose another place") from error


def _write_markdown(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")
