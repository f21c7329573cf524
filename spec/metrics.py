"""Acceptance figures: pure functions of trace events.

Field names are vLLM's where vLLM has one. A step's *depth* counts drafted levels from 1. Knows nothing of models,
clocks or files.

    tokens_per_step          committed tokens / steps: the bonus counts, tokens after an end of text do not
    draft_acceptance_rate    accepted / drafted tokens
    examined_acceptance_rate accepted / examined tokens; examined are the children of accepted nodes and of the root
    survival[d - 1]          steps that accepted at least d tokens / all steps (vLLM's per-position rate)
    conditional[d - 1]       the same count / steps that offered a child at depth d to an accepted node
    weights_bytes            fetched while steps went on, of a target whose weights are streamed
    weights_seconds          in which they were fetched; seconds["wait"] are those in which steps stood still for them
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trace import Event, Fetched

Counts = tuple[list[list[int]], list[list[int]]]
PREFIX = "paceline_"
_LABELS = {"acceptance_histogram": "accepted", "tokens_per_step_histogram": "tokens", "seconds": "phase"}
_COUNTERS = {"acceptance_histogram", "tokens_per_step_histogram", "seconds", "weights_bytes", "weights_seconds"}


def offers(events: Iterable["Event"]) -> Counts:
    """(hits, trials): an accepted node at depth d (0 is the root) had a child of rank r in `trials[d][r]` cases, and
    that child was accepted in `hits[d][r]` of them. Empty nodes count as missed. Where a text ended within a step, the
    children of its last node do not count."""
    counts: dict[tuple[int, int], list[int]] = {}
    for event in events:
        for depth, children in enumerate(event.offered()):
            for rank, child in enumerate(children):
                cell = counts.setdefault((depth, rank), [0, 0])
                cell[0] += child in event.accepted
                cell[1] += 1
    depths = 1 + max((depth for depth, _ in counts), default=-1)
    widths = [1 + max(rank for d, rank in counts if d == depth) for depth in range(depths)]
    rows = [[counts[depth, rank] for rank in range(width)] for depth, width in enumerate(widths)]
    return [[hit for hit, _ in row] for row in rows], [[trial for _, trial in row] for row in rows]


def summary(events: list["Event"]) -> dict:
    """All figures over `events`; rates are None where their denominator is 0. Seconds are sums over steps.

    `mean_acceptance_length` is 1 + accepted / steps (the bonus counted in every step, as in vLLM), `tokens_per_step`
    is lower where a text ended inside a step. Entry i of `acceptance_histogram` counts the steps that accepted i
    draft tokens, entry i of `tokens_per_step_histogram` those that committed i tokens. What begins with `weights_` is
    of a target whose weights are streamed, else None."""
    steps = len(events)
    accepted = [len(event.accepted) for event in events]
    committed = [len(event.committed) for event in events]
    drafted = sum(event.drafted for event in events)
    examined = sum(event.examined for event in events)
    hits, trials = offers(events)
    per_step = {(event.group, event.step): event for event in events}
    seconds: Counter[str] = Counter()
    for event in per_step.values():
        seconds.update(event.seconds)
    return {
        "mean_acceptance_length": 1 + sum(accepted) / steps if steps else None,
        "draft_acceptance_rate": sum(accepted) / drafted if drafted else None,
        "examined_acceptance_rate": sum(accepted) / examined if examined else None,
        "acceptance_histogram": histogram(accepted),
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": drafted,
        "num_examined_draft_tokens": examined,
        "num_tokens": sum(committed),
        "tokens_per_step": sum(committed) / steps if steps else None,
        "tokens_per_step_histogram": histogram(committed),
        "survival": [sum(row) / steps for row in hits],
        "conditional": [sum(hit) / trial[0] for hit, trial in zip(hits, trials)],
        "seconds": dict(seconds),
        **streaming([event.fetched for event in per_step.values() if event.fetched is not None], seconds),
    }


def streaming(fetched: "Sequence[Fetched]", seconds: Mapping[str, float]) -> dict[str, float | None]:
    """What steps, whose `seconds` by phase are sums, fetched of a streamed target's weights.

    `weights_hidden` is how much of the shorter of fetching and working went on beside the other: 1 where a step takes
    as long as the longer of them, 0 where they take turns."""
    size, spent = sum(each.bytes for each in fetched), sum(each.seconds for each in fetched)
    wait = seconds.get("wait", 0.0)
    shorter = min(spent, sum(seconds.values()) - wait)
    hidden = min(max((spent - wait) / shorter, 0.0), 1.0) if shorter > 0 else None
    return {
        "weights_bytes": size if fetched else None,
        "weights_seconds": spent if fetched else None,
        "weights_bandwidth": size / spent if spent else None,
        "weights_hidden": hidden if fetched else None,
    }


def histogram(values: list[int]) -> list[int]:
    counted = Counter(values)
    return [counted[i] for i in range(max(values, default=0) + 1)]


def node_use(events: list["Event"]) -> tuple[list[int], list[int], int] | None:
    """(parents, how often each node was accepted, steps) for the most frequent tree; the root counts in every step.

    None where there are no steps, or where no tree was used in at least half of them (a dynamic tree)."""
    shapes = Counter(tuple(event.parents) for event in events)
    if not shapes:
        return None
    parents, steps = shapes.most_common(1)[0]
    if 2 * steps < len(events):
        return None
    use = [0] * len(parents)
    for event in events:
        if tuple(event.parents) == parents:
            for node in (0, *event.accepted):
                use[node] += 1
    return list(parents), use, steps


def smallest_tree(parents: list[int], use: list[int], share: float = 0.97) -> list[int]:
    """The nodes, ascending, of the smallest tree that keeps `share` of the accepted and bonus tokens counted in `use`.

    An accepted path is cut where it leaves the smaller tree. No node is used more often than its parent, so the most
    used nodes form the best tree of each size. An estimate: what later steps would have drafted is not known."""
    wanted, kept, total = share * (use[0] + sum(use[1:])), [], 0
    for node in sorted(range(len(parents)), key=lambda node: (-use[node], node)):
        if total >= wanted:
            break
        kept.append(node)
        total += use[node]
    return sorted(kept)


def prometheus(figures: Mapping, labels: Mapping[str, str] | None = None) -> str:
    """`summary()` in Prometheus' text format, names prefixed with `paceline_`; figures that are None are left out.

    Lists are labelled by `accepted`, `tokens` or `depth`, seconds by `phase`."""
    lines = []
    for name, value in figures.items():
        entries: list[tuple[dict, float | None]] = [({}, value)]
        if isinstance(value, Mapping):
            entries = [({_LABELS[name]: key}, one) for key, one in value.items()]
        elif isinstance(value, list):
            first = 0 if name in _LABELS else 1
            entries = [({_LABELS.get(name, "depth"): str(key)}, one) for key, one in enumerate(value, first)]
        entries = [(entry_labels, one) for entry_labels, one in entries if one is not None]
        if not entries:
            continue
        kind = "counter" if name.startswith("num_") or name in _COUNTERS else "gauge"
        lines.append(f"# TYPE {PREFIX}{name} {kind}")
        for entry_labels, one in entries:
            marks = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**(labels or {}), **entry_labels}.items())
            lines.append(f"{PREFIX}{name}{{{marks}}} {one}" if marks else f"{PREFIX}{name} {one}")
    return "".join(line + "\n" for line in lines)


def _escaped(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
