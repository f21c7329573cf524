"""`paceline plan` and `paceline profile`: calibrate a drafter, measure the device, plan the tree.

A plan is kept in the cache for (target, drafter, device, dtype, executor, rule, temperature) and is what
`tree="auto"` looks up.
"""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import torch

from ..bench.runfile import read_run
from ..console import table
from ..data.forms import parse_columns
from ..data.sources import open_source
from ..engines.executors import choose
from ..files import check_writable, folders_above
from ..plan import step_times
from ..plan.calibration import calibrated
from ..plan.curves import Curves, measure
from ..plan.store import plan_path
from ..plan.streamed import in_words
from ..plan.trees import Acceptance, Plan, choose_tree
from ..prompts import BenchPrompt, fitting, left_padded, read_bench_prompts
from ..proposal import Drafter, DraftSampling, NoDrafter, parts_of
from ..provenance import target_fingerprint
from ..rows import Stopwatch
from ..stream.streamer import streamer_of
from ..tree import DynamicShape, TreeShape
from ..verify import draft_sampling
from .commands import check_drawing, load
from .plan_tables import show_draft, show_plan, show_target, show_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS, PROMPTS_STREAMED = 24, 8  # to calibrate on; where a forward takes seconds, as many as are decoded together


def plan(args: Namespace) -> None:
    """The command `paceline plan`."""
    check_drawing(args)
    if args.drafter == "none":
        raise ValueError("--drafter none leaves nothing to plan; choose a drafter")
    few = PROMPTS if args.stream is None else PROMPTS_STREAMED
    prompts = [] if args.run else named_prompts(args, args.calibrate, args.prompts or few)
    model, tokenizer, drafter = load(args)
    assert drafter is not None
    drawing = draft_sampling(args.verify, args.temperature > 0)
    executor = choose(args.executor, model, 0, capturable=True, compiled_before=False)
    parts = parts_of(drafter)
    if args.run and args.draft_weights != "16":
        raise ValueError(
            f"--from tells how drafts in 16 bits are accepted; plan --draft-weights {args.draft_weights} by --calibrate"
        )
    if args.run and len(parts) > 1:
        raise ValueError(f"a run file does not tell the shares of {drafter.name!r} apart; plan it with --calibrate")
    if len(parts) > 1 and drawing.coupling == "own":
        raise ValueError(f"verify='{args.verify}' lets {parts[0].name!r} alone draft; plan that one as --drafter")
    path = plan_path(model, drafter, executor, args.verify, args.temperature)
    check_writable(path, make_folders=True)
    if args.run:
        rates = [measured_acceptance(args, model).rates()]
        measured = measure(model, [drafter], executor, drawing)
        planned = choose_tree(rates[0], measured.target, measured.drafts[0])
        _announce(model, measured)
        show_plan([part.name for part in parts], rates, measured, planned, ())
    else:
        planned = _plan_by_replay(args, model, tokenizer, prompts, drafter, executor, drawing)
    drafting = drafter if len(planned.shape) > 1 else NoDrafter()
    runner = step_times.open_idle(model, executor, drafting, planned.shape, sampling=drawing)
    seconds = step_times.alone(model, runner, **({} if streamer_of(model) is None else step_times.SLOW))
    fixed = isinstance(planned.shape, TreeShape)
    how = "measured" if fixed else f"measured where all {planned.shape.max_depth} levels are drafted, none right"
    print(f"a step of it: {planned.seconds_per_step * 1e3:.1f} ms predicted, {seconds * 1e3:.1f} ms {how}")
    with folders_above(path):
        planned.save(path)
    if args.output:
        planned.save(args.output)
    print(f"kept for tree='auto'{f' and in {args.output}' if args.output else ''}", file=sys.stderr)


def _announce(model: "PreTrainedModel", measured: Curves) -> None:
    """How a streamed target is streamed, and when its steps were timed."""
    if (streamer := streamer_of(model)) is not None:
        print(f"{in_words(streamer.about)}\nsteps timed {measured.measured} (paceline profile times them anew)\n")


def _plan_by_replay(
    args: Namespace,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[BenchPrompt],
    drafter: Drafter,
    executor: str,
    drawing: DraftSampling,
) -> Plan:
    """The plan for `drafter` by replay of the prompts, printed; beside it, of one in 4 bits, that of 16 bits."""
    from ... import load_drafter

    encoded = [prompt for _, prompt in first_turns(prompts, tokenizer, model, args.max_new_tokens)]
    parts = parts_of(drafter)
    dense = load_drafter(args.drafter, model, tokenizer=tokenizer) if args.draft_weights != "16" else drafter
    others = () if dense.name == drafter.name else parts_of(dense)  # with "auto" it may be in 16 bits
    both = measure(model, [drafter, dense] if others else [drafter], executor, drawing)
    measured, of_others = both.of(0, len(parts)), both.of(len(parts), len(both.drafts))
    how = encoded, args.verify, args.temperature, args.max_new_tokens
    found = calibrated(model, parts, measured, *how)
    _announce(model, measured)
    show_plan([part.name for part in parts], found.rates, measured, found.plan, found.by_nodes)
    if len(parts) > 1:
        alone = zip(parts, found.alone)
        print("; ".join(f"{part.name} alone: {_in_words(each)}" for part, each in alone))
    if others:
        show_weights(drafter, (found, measured), (calibrated(model, others, of_others, *how, found.texts), of_others))
    return found.plan


def _in_words(planned: Plan) -> str:
    tree = f" with {planned.shape.text}" if isinstance(planned.shape, DynamicShape) else ""
    return f"{planned.speedup:.2f} times{tree}"


def measured_acceptance(args: Namespace, model: "PreTrainedModel") -> Acceptance:
    """Counts over a run file: the methods of the drafter, rule and temperature that are planned for. What their trees
    did not try is not known, so a run with a wide tree tells most. Raises ValueError where there is no such method."""
    run = read_run(args.run)
    if run.warning:
        print(run.warning, file=sys.stderr)
    if run.header["setup"]["fingerprint"] != target_fingerprint(model)[:16]:
        raise ValueError(f"{args.run} was measured on another model than {args.model}; give that one as --model")
    asked = args.drafter, args.verify, args.temperature
    names = [
        method["name"]
        for method in run.methods
        if (method["drafter"], method["rule"], method["temperature"]) == asked
        and method.get("draft_weights", "16") == "16"
    ]
    events = [event for name in names for record in run.of(name) for event in record.events]
    if not events:
        drafted = [method for method in run.methods if method["kind"] == "drafted"]
        known = ", ".join(f"{method['drafter']} ({method['rule']}, {method['temperature']:g})" for method in drafted)
        raise ValueError(
            f"{args.run} holds no measurement of drafter {args.drafter}, rule {args.verify}, temperature "
            f"{args.temperature:g}; it has {known or 'no drafter'}"
        )
    return Acceptance.of(events)


def profile(args: Namespace) -> None:
    """The command `paceline profile`: the device's curves, and where a step's time goes."""
    model, _, drafter = load(args)
    executor = choose(args.executor, model, 0, capturable=True, compiled_before=False)
    parts = () if drafter is None else parts_of(drafter)
    measured = measure(model, [] if drafter is None else [drafter], executor, anew=True)
    _announce(model, measured)
    show_target(measured)
    for number, part in enumerate(parts):
        show_draft(part.name, measured, number)
    shape = TreeShape.chain(15) if drafter is None else drafter.default_shape
    drafter = step_times.Blank() if drafter is None else drafter
    step, forward = step_times.step_and_forward_cost(model, drafter, executor, shape)
    timed = len(shape) <= max(measured.target)
    foretold = f" ({measured.step(shape) * 1e3:.1f} ms by these tables)" if timed else ""
    print(
        f"\na step of {len(shape)} nodes takes {step * 1e3:.1f} ms{foretold}, the target forward in it "
        f"{forward * 1e3:.1f} ms: {1 - forward / step:.1%} is spent elsewhere (drafting included)"
    )
    recording = step_times.recording_cost(shape.max_depth)
    print(
        f"recording and writing the trace of a row takes {recording * 1e3:.2f} ms, {recording / step:.2%} of that step"
    )
    if executor == "eager":
        watch_phases(model, drafter, shape, 20 if streamer_of(model) is None else 3)


def watch_phases(model: "PreTrainedModel", drafter: Drafter, shape: TreeShape, repeats: int) -> None:
    """Print the shares of an eager step."""
    runner = step_times.open_idle(model, "eager", drafter, shape)
    phases: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(repeats):
            watch = Stopwatch(model.device, streamer_of(model))
            runner.run(watch.mark)
            for phase, seconds in watch.seconds().items():
                phases.setdefault(phase, []).append(seconds)
    medians = {phase: sorted(values)[len(values) // 2] for phase, values in phases.items()}
    total = sum(medians.values())
    rows = [[phase, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"] for phase, seconds in medians.items()]
    print(f"\nan eager step of {len(shape)} nodes\n" + table(["phase", "ms", "share"], rows))


def named_prompts(args: Namespace, name: str, most: int | None = None) -> list[BenchPrompt]:
    """The prompts of the file or data set `name`, or `most` of them, spread over it."""
    return read_bench_prompts(open_source(name, args.split), most, parse_columns(args.columns))


def first_turns(
    prompts: list[BenchPrompt], tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", new_tokens: int
) -> list[tuple[str, dict]]:
    """(category, first turn as a batch of one row) of the prompts that can be continued by `new_tokens`."""
    taken = fitting(prompts, tokenizer, model, new_tokens)
    return [(prompt.category, left_padded([ids], 0, model.device)) for prompt, ids in taken]
