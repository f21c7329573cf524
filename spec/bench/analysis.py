"""From run files to figures: everything that a report, a comparison or a plan says, as plain data.

Times of a batch are shared evenly by its rows. Intervals draw whole prompts (batches, where they are larger), so that
repeats and turns of one prompt stay together. Pure functions of runs; knows nothing of pages.
"""

from collections import defaultdict
from dataclasses import asdict

from .. import metrics
from ..plan.trees import Acceptance, expected_tokens
from ..trace import Event
from ..tree import TreeShape
from .intervals import Interval, quotient_interval, ratio_interval, wilson
from .runfile import Record, Run

FEW = 30  # trials below which a rate is shown faintly


def analyse(runs: list[Run]) -> dict:
    """Figures of all methods of `runs`. Raises ValueError where their set-ups differ, naming the difference."""
    check_comparable(runs)
    methods = []
    for run in runs:
        for about in run.methods:
            if run.of(about["name"]):
                label = about["name"] if len(runs) == 1 else f"{run.path.rsplit('/', 1)[-1]}: {about['name']}"
                methods.append({"label": label, **method_figures(run, about)})
    drafted = [method for method in methods if method["kind"] == "drafted" and method["speedup"]]
    best = max(drafted, key=_assured, default=None)
    return {
        "setup": runs[0].header["setup"],
        "runs": [{key: run.header[key] for key in _ABOUT} | {"path": run.path} for run in runs],
        "warnings": [run.warning for run in runs if run.warning],
        "best": best and best["label"],
        "methods": methods,
    }


_ABOUT = ("created", "machine", "versions", "command", "commit", "memory")


def _assured(method: dict) -> float:
    """The gain that a method has at least; the estimate where no interval is known."""
    gain = method["speedup"]
    return gain["value"] if gain["low"] is None else gain["low"]


def check_comparable(runs: list[Run]) -> None:
    first = runs[0].header
    for run in runs[1:]:
        pairs = {**_flat(first), **{key: None for key in _flat(run.header) if key not in _flat(first)}}
        for key, value in pairs.items():
            other = _flat(run.header).get(key)
            if other != value:
                raise ValueError(
                    f"{runs[0].path} has {key} = {value!r} and {run.path} {key} = {other!r}; compare runs of one set-up"
                )


def _flat(header: dict) -> dict:
    return {**header["setup"], **{f"machine {key}": value for key, value in header["machine"].items()}}


def method_figures(run: Run, about: dict) -> dict:
    """All figures of one method of a run."""
    records = run.of(about["name"])
    anchors = {"speedup": about["baseline"], "over_transformers": _transformers(run, about)}
    baselines = {name: run.of(anchor) for name, anchor in anchors.items() if anchor and anchor != about["name"]}
    events = [event for record in records for event in record.events]
    overall = row("together", records, baselines)
    groups = defaultdict(list)
    for record in records:
        groups[record.category].append(record)
    categories = [row(name, group, baselines) for name, group in sorted(groups.items())]
    hits, trials = metrics.offers(events)
    compared = [record for record in records if record.identical is not None]
    return {
        **{key: value for key, value in about.items() if key != "shape"},
        **{key: overall[key] for key in ("speedup", "over_transformers", "rate", "tokens_per_step")},
        "shape": about.get("shape"),
        "overall": overall,
        "categories": categories,
        "macro": macro(categories),
        "identical": sum(record.identical for record in compared),
        "compared": len(compared),
        "differences": [
            {"prompt": r.prompt, "turn": r.turn, "repeat": r.repeat, **asdict(r.difference)}
            for r in compared
            if r.difference
        ],
        "summary": metrics.summary(events),
        "percentiles": percentiles(metrics.histogram([len(event.committed) for event in events])),
        "depths": depths(events, hits, trials),
        "ranks": [list(zip(*pair)) for pair in zip(hits, trials)],
        "tree": tree(events),
        "split": split(records, events),
        "predicted": predicted(records, run.of(about["baseline"])) if about["kind"] == "drafted" else None,
        "memory": memory(run, about, records),
    }


def _transformers(run: Run, about: dict) -> str | None:
    wanted = "transformers", about["temperature"]
    same = (method["name"] for method in run.methods if (method["kind"], method["temperature"]) == wanted)
    return next(same, None)


def row(name: str, records: list[Record], baselines: dict[str, list[Record]]) -> dict:
    """One line of the table: sums and rates of `records`, and gains over the same turns of each baseline."""
    sums = unit_sums(records)
    figures = metrics.summary([event for record in records for event in record.events])
    seconds, tokens, steps = (sum(unit[i] for unit in sums.values()) for i in range(3))
    per_step = ratio_interval([t for _, t, _ in sums.values()], [n for _, _, n in sums.values()]) if steps else None
    out = {
        "name": name,
        "prompts": len({record.prompt for record in records}),
        "tokens": tokens,
        "seconds": seconds,
        "rate": tokens / seconds,
        "tokens_per_step": _data(per_step),
        "accepted": figures["num_accepted_draft_tokens"],
        "drafted": figures["num_draft_tokens"],
        "examined": figures["num_examined_draft_tokens"],
        "speedup": None,
        "beside_plain": len({turn[0] for turn in shared_turns(records, baselines.get("speedup", []))}),
        "over_transformers": None,
        "speedup_of_steps": _data(speedup(records, baselines.get("speedup", []), steps_alone=True)),
    }
    return out | {key: _data(speedup(records, plain)) for key, plain in baselines.items()}


def unit_sums(records: list[Record], steps_alone: bool = False) -> dict[int, tuple[float, int, int]]:
    """(seconds, tokens, steps) of each batch of prompts, the unit that is drawn."""
    sums: dict[int, tuple[float, int, int]] = {}
    counted = set()  # steps, which the rows of a batch share
    for record in records:
        seconds, tokens, steps = sums.get(record.batch, (0.0, 0, 0))
        if steps_alone:
            new = [event for event in record.events if (event.group, event.step) not in counted]
            counted |= {(event.group, event.step) for event in new}
            seconds += sum(sum(event.seconds.values()) for event in new)
        else:
            seconds += record.seconds / record.rows
        sums[record.batch] = seconds, tokens + len(record.tokens), steps + len(record.events)
    return sums


def paired(*sides: list[Record], steps_alone: bool = False) -> list[list[tuple[float, int, int]]]:
    """Sums of each side over the turns that all sides have, unit by unit."""
    turns = shared_turns(*sides)
    sums = [unit_sums([r for r in side if (r.prompt, r.turn, r.repeat) in turns], steps_alone) for side in sides]
    return [[side_sums[unit] for unit in sums[0]] for side_sums in sums]


def shared_turns(*sides: list[Record]) -> set[tuple[str, int, int]]:
    return set.intersection(*[{(r.prompt, r.turn, r.repeat) for r in side} for side in sides])


def speedup(records: list[Record], plain: list[Record], steps_alone: bool = False) -> Interval | None:
    """Seconds per token of `plain` by those of `records`, over the same turns; at equal tokens the ratio of times.
    With `steps_alone` without what passes outside of steps, such as the reading of prompts; None where there are
    none."""
    plain_sums, sums = paired(plain, records, steps_alone=steps_alone)
    if not sums or (steps_alone and not all(steps for _, _, steps in [*plain_sums, *sums])):
        return None
    (a, b), (c, d) = ([[unit[i] for unit in side] for i in (0, 1)] for side in (plain_sums, sums))
    return quotient_interval([a, d], [b, c])


def macro(categories: list[dict]) -> dict:
    """Means over categories, each weighing the same."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        "rate": mean([category["rate"] for category in categories]),
        **{
            key: mean([category[key] and category[key]["value"] for category in categories])
            for key in ("tokens_per_step", "speedup", "speedup_of_steps", "over_transformers")
        },
    }


def percentiles(counts: list[int], shares=(0.1, 0.5, 0.9)) -> list[int]:
    """The smallest number that is at least as large as a share of the numbers that a histogram counts."""
    wanted = [share * sum(counts) for share in shares]
    return [next((n for n in range(len(counts)) if sum(counts[: n + 1]) >= least), 0) for least in wanted]


def depths(events: list[Event], hits, trials) -> list[dict]:
    """Survival and conditional acceptance by depth, with counts and Wilson's intervals."""
    out = []
    for depth, (hit, trial) in enumerate(zip(hits, trials), 1):
        reached = sum(hit)
        sides = {"survival": len(events), "conditional": trial[0]}
        figures = {
            name: {"value": reached / of, "of": of, "low": (b := wilson(reached, of))[0], "high": b[1]}
            for name, of in sides.items()
        }
        out.append({"depth": depth, "accepted": reached, **figures})
    return out


def tree(events: list[Event]) -> dict | None:
    """The drafted tree with each node's use, and the smallest one that keeps 97 %; None where trees are dynamic."""
    used = metrics.node_use(events)
    if used is None or len(used[0]) == 1:
        return None
    parents, use, steps = used
    return {"parents": parents, "use": use, "steps": steps, "kept": metrics.smallest_tree(parents, use)}


def split(records: list[Record], events: list[Event]) -> dict[str, float]:
    """Seconds by phase; `other` is what passed outside of steps: reading the prompt, the host."""
    phases = metrics.summary(events)["seconds"] if events else {}
    total = sum(record.seconds / record.rows for record in records)
    return {**phases, "other": max(0.0, total - sum(phases.values()))}


def predicted(records: list[Record], plain: list[Record]) -> dict | None:
    """tokens per step / (cost of a step, in plain steps): the speed-up if steps were all that takes time; and the
    tokens per step that the planner's model expects of the tree, from acceptance by depth and rank."""
    summary = metrics.summary([event for record in records for event in record.events])
    plain_summary = metrics.summary([event for record in plain for event in record.events])
    if not summary["num_spec_steps"] or not plain_summary["num_spec_steps"]:
        return None
    calls = [len({(e.group, e.step) for r in side for e in r.events}) for side in (records, plain)]
    step, plain_step = (sum(s["seconds"].values()) / count for s, count in zip((summary, plain_summary), calls))
    used = metrics.node_use([event for record in records for event in record.events])
    rates = Acceptance.of(event for record in records for event in record.events).rates()
    model = expected_tokens(rates, TreeShape(tuple(used[0]))) if used else None
    cost = step / plain_step
    gain = summary["tokens_per_step"] / plain_summary["tokens_per_step"]
    return {"step_cost": cost, "speedup": gain / cost, "planned_tokens_per_step": model}


def memory(run: Run, about: dict, records: list[Record]) -> dict:
    """Bytes: weights of target and drafter, and the caches at the longest text; `peak` where the device counts."""
    known = run.header["memory"]
    drafter = known["drafters"].get(about["name"], {"weights": 0, "slot": 0})
    nodes = (about.get("shape") or {"nodes": 1})["nodes"]
    slots = max(r.rows * (r.prompt_tokens + len(r.tokens) + nodes + 1) for r in records)
    peaks = [r.memory for r in records if r.memory is not None]
    return {
        "target": known["target"],
        "drafter": drafter["weights"],
        "cache": slots * (known["slot"] + drafter["slot"]),
        "peak": max(peaks, default=None),
    }


def _data(interval: Interval | None) -> dict | None:
    return None if interval is None else asdict(interval)
