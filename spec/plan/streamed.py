"""Step times of a streamed target, kept from one plan to the next: a step takes seconds, so that few are timed.

A forward takes the longer of fetching the weights and computing, and some more: equally long for few nodes and for
many, up to a number that is looked for here. The curve is kept for what it depends on. A drafter's own time is not
that of whole steps, in which it would not be seen, but that of drafting alone. Knows nothing of acceptance.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import Bar
from ..engines.runs import many_scores
from ..files import folders_above, write_json
from ..proposal import Drafter, DraftSampling, NoDrafter
from ..stream.record import StreamAbout
from ..tree import DynamicShape, TreeShape
from .grown import WIDEST, WIDTHS
from .step_times import SLOW, Blank, alone, open_idle
from .store import curve_path
from .trees import rising

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Curve = dict[int, float]
SIZES = (1, 8, 32, 64, 128, 256, 512)  # nodes
LEVELS = (1, 4, 16)  # of drafting
CAPACITY = 1152  # slots of an engine that is timed; half of them hold text, and the largest tree fits behind it
GROWN = 256  # nodes of the trees that are grown to time drafting


def target_curve(model: "PreTrainedModel", anew: bool) -> tuple[Curve, float, str]:
    """Seconds of a step by nodes, without drafting; those of each accepted token, where scores are computed along the
    accepted path only, of which a step that is timed has the root alone; and when they were measured: now, and kept,
    where that has not been done before, or `anew`."""
    path = curve_path(model)
    if not anew and (kept := _read(path)) is not None:
        return kept
    seconds: Curve = {}
    with Bar(SIZES, desc="timing steps", unit="size") as bar:
        for nodes in bar:
            drafter, shape = (Blank(), bush(nodes)) if nodes > 1 else (NoDrafter(), TreeShape.chain(0))
            seconds[nodes] = alone(model, open_idle(model, "eager", drafter, shape, CAPACITY), **SLOW)
    walking = 0.0
    if many_scores(model, 1, max(SIZES), "match", False):
        walking = alone(model, open_idle(model, "eager", Blank(), bush(max(SIZES)), CAPACITY, work="walk"), **SLOW)
    curve, now = rising(seconds), datetime.now(UTC).isoformat(timespec="minutes")
    by_nodes = {str(nodes): spent for nodes, spent in curve.items()}
    with folders_above(path):
        write_json(path, {"seconds": by_nodes, "walking": walking, "measured": now})
    return curve, walking, now


def _read(path: Path) -> tuple[Curve, float, str] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        curve = {int(nodes): float(spent) for nodes, spent in kept["seconds"].items()}
        return (curve, float(kept["walking"]), str(kept["measured"])) if tuple(curve) == SIZES else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def bush(nodes: int) -> TreeShape:
    """A tree of some nodes with as many on each level as a large tree may have."""
    width = -(-(nodes - 1) // WIDEST.max_depth)
    return TreeShape(tuple(max(node - width, 0) if node else -1 for node in range(nodes)))


def draft_curves(model: "PreTrainedModel", drafter: Drafter, sampling: DraftSampling) -> dict[int, Curve]:
    """Seconds of drafting by levels: for each of `WIDTHS`, of growing dynamic trees, and for a drafter of fixed trees,
    whose width is 1 here, of chains."""
    dynamic = drafter.traits.fills_dynamic and sampling.coupling != "own"
    levels = LEVELS if dynamic or drafter.traits.fills_dynamic else (1, min(drafter.traits.deepest, WIDEST.max_depth))
    curves: dict[int, Curve] = {}
    for width in WIDTHS if dynamic else (1,):
        seconds = {0: 0.0}
        for depth in levels:
            most = 1 + width + width**2 * (depth - 1)
            shape = DynamicShape(min(most, GROWN), depth, width) if dynamic else TreeShape.chain(depth)
            runner = open_idle(model, "eager", drafter, shape, CAPACITY, sampling, work="draft")
            seconds[depth] = alone(model, runner, repeats=3, warm_up=1)
        curves[width] = rising(seconds)
    return curves


def in_words(about: StreamAbout) -> str:
    """How a model is streamed, for a table's heading."""
    streamed = about.layers - about.resident_layers
    return (
        f"{streamed} of {about.layers} layers streamed from {about.kind}, {about.bytes_per_forward / 1e9:.2f} GB a "
        f"forward{', past the page cache' if about.direct else ''}; {about.resident_layers} layers resident"
    )
