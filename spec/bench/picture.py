"""A picture of speculation, as one SVG: a few steps of a real text, each with its drafted tree, and the text beneath.

It is drawn from a run file, whose first texts keep what their tokens read. docs/picture.svg is made by

    echo '{"id": "code", "prompt": "Write a Python function that adds two numbers."}' > one.jsonl
    paceline bench one.jsonl -o run.jsonl --max-new-tokens 48 --methods \
        smollm2-135m-hydra+ngram:tree=3x2x1+chain:3,name=hydra+ngram
    paceline report run.jsonl --picture docs/picture.svg

The steps are those neighbours whose tokens per step come nearest to the whole run's, so they show neither its best nor
its worst. The same run file gives the same picture, for light and dark. Knows nothing of models and of time.
"""

import math
import unicodedata
from dataclasses import dataclass

from markupsafe import escape

from ..trace import Event
from .drawing import places
from .runfile import Record
from .token_chips import piece

STEPS, NODES = 4, 24  # steps shown, and drafted tokens of each
WIDTH, MARGIN, ROW, CELL, GAP = 900, 20, 27, 7.9, 20
LONGEST = 14  # letters of a token in a tree
CONTEXT = 60  # cells of the text before the steps

STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; fill: #1c2430; }
.label { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #566070; }
.paper { fill: #ffffff; stroke: #cfd5de; } .root { fill: #f3f5f8; stroke: #8a94a3; }
.accepted { fill: #d5efd9; stroke: #2e8540; } .bonus { fill: #d8e6f8; stroke: #2563a8; }
.rejected { fill: none; stroke: #b3bac5; stroke-dasharray: 3 2; } .faint { fill: #6b7483; }
.edge { fill: none; stroke: #b3bac5; } .path { stroke: #2e8540; stroke-width: 2; }
.own { stroke: #2563a8; stroke-width: 2; } .text rect { stroke: none; }
@media (prefers-color-scheme: dark) {
text { fill: #e6e9ee; } .label, .faint { fill: #a7b0bd; }
.paper { fill: #14181e; stroke: #3a4350; } .root { fill: #1e242d; stroke: #7d8896; }
.accepted { fill: #1f4a2a; stroke: #58b56b; } .bonus { fill: #1f3a5c; stroke: #6db3ff; }
.rejected { fill: none; stroke: #5a6472; } .edge { stroke: #4a5462; } .path { stroke: #58b56b; }
.own { stroke: #6db3ff; } }
"""


@dataclass(frozen=True, slots=True)
class Node:
    """A token of a step's tree, or the target's own behind it."""

    kind: str  # "root", "accepted", "bonus" or "rejected"
    text: str
    parent: int


class Panel:
    """A step and where the nodes of its tree stand: levels from the left to the right, each as wide as its longest."""

    def __init__(self, record: Record, event: Event):
        self.event, self.nodes = event, nodes(record, event)
        self.spots = places([node.parent for node in self.nodes])
        self.height = 1 + max(row for _, row in self.spots.values())  # in rows
        levels = [0.0] * (1 + max(depth for depth, _ in self.spots.values()))
        for node, (depth, _) in self.spots.items():
            levels[depth] = max(levels[depth], _box(self.nodes[node].text) + GAP)
        self.lefts = [sum(levels[:depth]) for depth in range(len(levels))]
        self.width = sum(levels) - GAP

    @property
    def heading(self) -> str:
        hidden = self.event.drafted - sum(node.kind in ("accepted", "rejected") for node in self.nodes)
        more = f", {hidden} not shown" if hidden else ""
        return f"step {self.event.step + 1}: {len(self.event.accepted)} of {self.event.drafted} accepted{more}"

    @property
    def told(self) -> str:
        """The step for those who cannot see it."""
        taken = ", ".join(f"“{node.text}”" for node in self.nodes if node.kind == "accepted") or "none"
        bonus = next((f" The target's own token is “{node.text}”." for node in self.nodes if node.kind == "bonus"), "")
        return f"Step {self.event.step + 1} drafted {self.event.drafted} tokens; accepted: {taken}.{bonus}"

    def draw(self, x: float, y: float) -> list[str]:
        edges, boxes = [], []
        for index, node in enumerate(self.nodes):
            left, middle = self._at(index, x, y)
            if node.parent >= 0:
                start, above = self._at(node.parent, x, y)
                start += _box(self.nodes[node.parent].text)
                half = (start + left) / 2
                kind = {"accepted": "edge path", "bonus": "edge own"}.get(node.kind, "edge")
                bend = f"{half:.1f} {above:.1f} {half:.1f} {middle:.1f}"
                edges.append(f'<path class="{kind}" d="M{start:.1f} {above:.1f}C{bend} {left:.1f} {middle:.1f}"/>')
            boxes.append(_rect(node.kind, left, middle - 10, _box(node.text), 20))
            boxes.append(_letters(left + 6, middle + 4, _short(node.text), "faint" if node.kind == "rejected" else ""))
        return edges + boxes

    def _at(self, index: int, x: float, y: float) -> tuple[float, float]:
        depth, row = self.spots[index]
        return x + self.lefts[depth], y + row * ROW + 11


def picture(record: Record, per_step: float, about: str) -> str:
    """The SVG of some steps of `record`, whose method commits `per_step` tokens a step over the whole run."""
    first = typical(record.events, per_step)
    panels = [Panel(record, event) for event in record.events[first : first + STEPS]]
    title = f"{about}, steps {first + 1} to {first + len(panels)}; {per_step:.2f} tokens per step in the whole run"
    trees, top = _side_by_side(panels, 58)
    text, bottom = _text(record, first, top + 8)
    body = [_label(MARGIN, 28, title), *trees, '<g class="text">', *text, "</g>", *_legend(bottom + 16)]
    height, width = bottom + 44, max([WIDTH, *(2 * MARGIN + panel.width for panel in panels)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title desc">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="desc">{escape(" ".join(panel.told for panel in panels))}</desc>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def typical(events: list[Event], per_step: float) -> int:
    """Where the steps begin whose mean number of tokens is nearest to `per_step`; the earliest of equals."""
    committed = [len(event.committed) for event in events]
    count = min(STEPS, len(events))
    starts = range(len(events) - count + 1)
    return min(starts, key=lambda start: abs(sum(committed[start : start + count]) - count * per_step))


def nodes(record: Record, event: Event) -> list[Node]:
    """The root, the accepted tokens and as many others as there is room for, then the target's own token."""
    drawn: dict[int, int] = {}  # node of the event: place among those drawn
    made: list[Node] = []
    spare = NODES - len(event.accepted)
    for node, (token, parent) in enumerate(zip(event.tokens, event.parents)):
        kind = "root" if node == 0 else "accepted" if node in event.accepted else "rejected"
        if kind == "rejected" and (token < 0 or parent not in drawn or spare <= 0):
            continue
        spare -= kind == "rejected"
        drawn[node] = len(made)
        made.append(Node(kind, piece(record, token), drawn.get(parent, -1)))
    if event.bonus is not None:
        last = event.accepted[-1] if event.accepted else 0
        made.append(Node("bonus", piece(record, event.bonus), drawn[last]))
    return made


def _side_by_side(panels: list[Panel], top: float) -> tuple[list[str], float]:
    """The trees in rows of the same length, as many in each as there is room for; and where they end."""
    room = WIDTH - 2 * MARGIN + GAP
    fitting = max(1, int(room // (max(panel.width for panel in panels) + GAP)))
    columns = math.ceil(len(panels) / math.ceil(len(panels) / fitting))
    out = []
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        for column, panel in enumerate(row):
            x = MARGIN + column * room / columns
            out += [_label(x, top, panel.heading), *panel.draw(x, top + 12)]
        top += 46 + max(panel.height for panel in row) * ROW
    return out, top - 12


def _text(record: Record, first: int, y: float) -> tuple[list[str], float]:
    """The text of the steps in the colours of their trees, behind what stood before; and where it ends."""
    out, x = [_label(MARGIN, y, "the text that they make")], float(MARGIN)
    y += 24
    for kind, text in _stream(record, first):
        wide = CELL * _cells(text)
        if x + wide > WIDTH - MARGIN and x > MARGIN:
            x, y = float(MARGIN), y + ROW
        if kind != "before":
            out.append(_rect(kind, x, y - 11, wide, 22))
        blank = len(text) - len(text.lstrip(" "))
        out.append(_letters(x + blank * CELL, y + 4, text.strip(" "), "faint" if kind == "before" else ""))
        x += wide + (0 if kind == "before" else 1.5)
    return out, y + 18


def _stream(record: Record, first: int) -> list[tuple[str, str]]:
    """(kind, text) of the tokens of the steps, and of some that stand before them."""
    earlier = [piece(record, token) for event in record.events[:first] for token in event.committed]
    start = len(earlier)
    while start and sum(map(_cells, earlier[start - 1 :])) <= CONTEXT:
        start -= 1
    made = [("before", "…")] * (start > 0) + [("before", text) for text in earlier[start:]]
    for event in record.events[first : first + STEPS]:
        for index, token in enumerate(event.committed):
            made.append(("accepted" if index < len(event.accepted) else "bonus", piece(record, token)))
    return [(kind, _cut(text, CONTEXT)) for kind, text in made]


def _legend(y: float) -> list[str]:
    out, x = [], float(MARGIN)
    for kind, text in (
        ("accepted", "drafted and accepted"),
        ("bonus", "the target's own"),
        ("rejected", "drafted, not accepted"),
        ("root", "last token before the step"),
    ):
        out.append(_rect(kind, x, y - 10, 18, 14))
        out.append(_label(x + 25, y + 1, text))
        x += 25 + 7 * len(text) + 20
    out.append(_label(x, y + 1, "· a space"))
    return out


def _rect(kind: str, x: float, y: float, wide: float, tall: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.0f}" rx="4"/>'


def _letters(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""


def _label(x: float, y: float, text: str) -> str:
    return _letters(x, y, text, "label")


def _short(text: str) -> str:
    """As it stands in a tree, where spaces are seen."""
    return _cut(text, LONGEST).replace(" ", "·")


def _cut(text: str, longest: int) -> str:
    text = text.replace("\n", "")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _box(text: str) -> float:
    """The width of a token's box in a tree."""
    return _cells(_short(text)) * CELL + 12


def _cells(text: str) -> int:
    """How many letters wide a text is where every letter has the same width, or two of them."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)
