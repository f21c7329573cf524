"""`paceline plan` and `paceline profile`: calibrate a drafter, measure the device, plan the tree.

A plan is kept in the cache for (target, drafter, device, dtype, executor, rule, temperature) and is what
`tree="auto"` looks up.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import curves
from .commands import encode, load
from .compare import compare
from .console import table
from .executors import choose
from .generate import generate
from .loop import Stopwatch
from .planner import Acceptance, Plan, choose_tree, grow
from .plans import plan_path
from .proposal import DraftSampling, NoDrafter
from .tree import TreeShape

# What drafters are like, roughly: the tree with which an unknown one is calibrated is planned for this.
_PRIOR = [[0.6 * 0.4**rank for rank in range(8)] for _ in range(8)]


def calibrate(model, drafter, prompts: list[dict], rule: str, sampling: dict, new_tokens: int) -> Acceptance:
    """Decode `prompts` (as `encode` makes them) with a wide tree and count what is accepted by depth and rank.

    Drafters differ by how they draw, so p belongs to a rule and a temperature."""
    tree = TreeShape(tuple(grow(_PRIOR, 48, 8)[0]))
    events = []
    for number, prompt in enumerate(tqdm(prompts, desc="calibrating", unit="prompt", disable=len(prompts) < 2)):
        options = dict(sampling, max_new_tokens=new_tokens, return_dict_in_generate=True, executor="eager")
        events += generate(
            model, **prompt, drafter=drafter, tree=tree, verify=rule, seed=number, **options
        ).trace.events
    return Acceptance.of(events)


def plan(args) -> None:
    """The command `paceline plan`."""
    model, tokenizer, drafter = load(args)
    if drafter is None:
        raise ValueError("--drafter none leaves nothing to plan; choose a drafter")
    prompts = [prompt for _, prompt in _prompts(args.calibrate, tokenizer, model, args.prompts)]
    sampled = args.temperature > 0
    options = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if sampled else {"do_sample": False}
    rates = calibrate(model, drafter, prompts, args.verify, options, args.max_new_tokens).rates()
    drawing = DraftSampling.for_rule(args.verify, sampled, args.temperature or 1.0)
    executor = choose(args.executor, model.device, 0, capturable=True, compiled_before=False)
    measured = curves.measure(model, drafter, executor, sampling=drawing)
    planned = choose_tree(rates, measured.target, measured.draft)
    _show(rates, measured, planned)
    path = plan_path(model, drafter, executor, args.verify, args.temperature)
    path.parent.mkdir(parents=True, exist_ok=True)
    planned.save(path)
    if args.output:
        planned.save(args.output)
    print(f"kept for tree='auto'{f' and in {args.output}' if args.output else ''}", file=sys.stderr)


def profile(args) -> None:
    """The command `paceline profile`: the device's curves, and where a step's time goes."""
    model, tokenizer, drafter = load(args)
    drafter = NoDrafter() if drafter is None else drafter
    if args.compare:
        prompts = _prompts(args.compare, tokenizer, model, args.prompts)
        compare(model, prompts, drafter, args.tree, args.executor, args.max_new_tokens)
        return
    executor = choose(args.executor, model.device, 0, capturable=True, compiled_before=False)
    measured = curves.measure(model, drafter, executor)
    _show_curves(measured)
    if executor == "eager":
        watch_phases(model, drafter)


def watch_phases(model, drafter, repeats: int = 20) -> None:
    """Print the shares of an eager step."""
    shape = TreeShape.chain(15) if not isinstance(drafter, NoDrafter) else drafter.default_shape
    runner = curves.open_idle(model, "eager", drafter, shape, 512)
    phases: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(repeats):
            watch = Stopwatch(model.device)
            runner.run(watch.mark)
            for phase, seconds in watch.seconds().items():
                phases.setdefault(phase, []).append(seconds)
    medians = {phase: sorted(values)[len(values) // 2] for phase, values in phases.items()}
    total = sum(medians.values())
    rows = [[phase, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"] for phase, seconds in medians.items()]
    print(f"\nan eager step of {len(shape)} nodes\n" + table(["phase", "ms", "share"], rows))


def _prompts(path: str, tokenizer, model, most: int) -> list[tuple[str, dict]]:
    """(category, encoded first turn) of a JSONL file with `turns` or `prompt`, `most` of them, spread over it."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [
            (str(line.get("category", "")), line["turns"][0] if "turns" in line else line["prompt"]) for line in lines
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSONL file with 'turns' or 'prompt' in each line ({error})") from error
    if not texts:
        raise ValueError(f"{path} holds no prompts")
    chosen = texts[:: max(1, len(texts) // most)][:most]
    chat = bool(tokenizer.chat_template)
    return [(category, encode(tokenizer, text, chat, model.device)) for category, text in chosen]


def _show_curves(measured: curves.Curves) -> None:
    plain = measured.target[1]
    rows = [[str(n), f"{seconds * 1e3:.1f}", f"{seconds / plain:.2f}"] for n, seconds in measured.target.items()]
    print(table(["nodes", "step ms", "of plain"], rows))
    rows = [[str(d), f"{seconds * 1e3:.1f}", f"{seconds / plain:.2f}"] for d, seconds in measured.draft.items()]
    print("\n" + table(["draft levels", "ms", "of plain"], rows))


def _show(rates, measured: curves.Curves, planned: Plan) -> None:
    _show_curves(measured)
    width = max((len(row) for row in rates), default=0)
    rows = [[str(depth + 1), *(f"{p:.3f}" for p in row), *[""] * (width - len(row))] for depth, row in enumerate(rates)]
    print("\n" + table(["p: depth", *(f"rank {rank}" for rank in range(width))], rows))
    shape = planned.shape
    print(
        f"\n{len(shape)} nodes, depth {shape.max_depth}: {planned.tokens_per_step:.2f} tokens per step expected, "
        f"{planned.speedup:.2f} times plain decoding\nparents {list(shape.parents)}"
    )
