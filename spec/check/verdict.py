"""The conclusions of a check: its final sentence, and which of the two captured steps is better on this GPU."""

import sys

import torch

from ..engines.capture_choice import keep_verdict
from .record import FAILS, HOLDS, NOT_HERE, Check

COMPARED_TEXTS, COMPARED_SIZES = 6, 3  # least numbers for the verdict on captured steps


def verdict(result: Check) -> str:
    """The final sentence: whether decoding is lossless here, and what speculation gains."""
    lossless = next(part for part in result.parts if part.name == "lossless").findings
    counts = {kind: sum(f.verdict == kind for f in lossless) for kind in (HOLDS, FAILS, NOT_HERE)}
    parted, texts = (sum(f.figures.get(name, 0) for f in lossless) for name in ("parted", "texts"))
    if counts[FAILS]:
        first = next(f for f in lossless if f.verdict == FAILS)
        named = ", ".join(str(value) for value in first.what.values())
        said = f"NOT every promise holds here: {counts[FAILS]} of {len(lossless)} checks fail, the first is {named}"
    elif not result.compared:
        said = "No drafted text was compared with plain decoding"
    else:
        rest = f", {counts[NOT_HERE]} could not be made" if counts[NOT_HERE] else ""
        ties = f"; {parted} of {texts} texts part at near-ties" if parted else ""
        said = f"Lossless here: {counts[HOLDS]} of {len(lossless)} checks hold{rest}{ties}"
    failing = [part.title for part in result.parts if part.verdict == FAILS and not part.must_hold]
    trouble = f"; failed: {', '.join(failing)}" if failing else ""
    cut = "; the check was stopped" if result.interrupted else ""
    return f"{said}{'' if counts[FAILS] else _worth(result)}{trouble}{cut}."


def _worth(result: Check) -> str:
    """The gain of the best tree over the fastest plain step; the two may have different executors."""
    findings = {part.name: part.findings for part in result.parts}
    drafted = [f for f in findings["worth"] if f.what.get("accepted") == "70%" and "token_seconds" in f.figures]
    single = [f for f in findings["steps"] if (f.what.get("rows"), f.what.get("nodes")) == (1, 1)]
    plain = [f.figures["step_seconds"] for f in single if "step_seconds" in f.figures]
    if not drafted or not plain:
        return ""
    best = min(drafted, key=lambda finding: finding.figures["token_seconds"])
    gain = min(plain) / best.figures["token_seconds"]
    if gain <= 1:
        return "; at 70% acceptance a level speculation does not pay here"
    setting = f"{best.what['executor']} steps, drafts like {best.what['drafter']}'s"
    return f"; at 70% acceptance a level the best tree would be {gain:.2f} times as fast as plain decoding ({setting})"


def keep_better_capture(device: torch.device, result: Check) -> None:
    """On a GPU, store which captured step is better, if enough texts of the compiled one were compared and steps of
    enough sizes were timed with both."""
    parts = {part.name: part for part in result.parts}
    eager, compiled = "cuda_graph_eager", "cuda_graph_compiled"
    texts = [f for f in parts["lossless"].findings if f.what.get("executor") == compiled]
    seconds = {
        (f.what["executor"], f.what["nodes"]): f.figures["step_seconds"]
        for f in parts["steps"].findings
        if f.what.get("rows") == 1 and "step_seconds" in f.figures and not f.reason
    }
    both = [nodes for name, nodes in seconds if name == compiled and (eager, nodes) in seconds]
    if len(both) < COMPARED_SIZES or sum(f.verdict != NOT_HERE for f in texts) < COMPARED_TEXTS:
        return
    right = all(f.verdict != FAILS for f in texts)
    faster = all(seconds[compiled, nodes] < seconds[eager, nodes] for nodes in both)
    try:
        keep_verdict(device, right and faster)
    except ValueError as error:
        print(f"which capture is better is not kept: {error}", file=sys.stderr)
