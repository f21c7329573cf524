"""Pictures as inline SVG, each with a title, in the colours of the page's style sheet. Knows only numbers."""

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BELOW = 560, 220, 44, 34


def _svg(title: str, body: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    name = escape(title)
    return Markup(
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {width} {height}" style="max-width:{width}px">'
        f"<title>{name}</title>{body}</svg>"
    )


def _text(x: float, y: float, text, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(text))}</text>'


def gain(title: str, figure: dict, most: float, kind: str) -> Markup:
    """A bar from 0 to a gain, its interval, and a piece of the line at 1. It is as wide as its place and of one height,
    on a phone too; a bound beyond `most` is cut off."""

    def line(kind: str, start: float, end: float, top: int, bottom: int) -> str:
        x1, x2 = (f"{100 * x / most:.2f}%" for x in (start, end))
        return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{top}" y2="{bottom}"/>'

    long, low, high = 100 * figure["value"] / most, figure["low"], figure["high"]
    parts = [f'<rect class="gained {kind}" x="0" y="8" width="{long:.2f}%" height="20"/>', line("one", 1, 1, 0, 36)]
    if low is not None:
        parts += [line("whisker", low, high, 18, 18), *(line("whisker", x, x, 13, 23) for x in (low, high))]
    name = escape(title)
    return Markup(f'<svg role="img" aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>')


def one(most: float, label: str) -> Markup:
    """What the line at 1 is called, beneath the bars."""
    percent = 100 / most
    anchor = "start" if percent < 25 else "end" if percent > 75 else "middle"
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}"><text x="{percent:.2f}%" y="13" text-anchor="{anchor}">'
        f"{escape(label)}</text></svg>"
    )


def widest(gains: list[dict]) -> float:
    """Where the bars' scale ends: all intervals are on it, but for bounds beyond twice the largest gain."""
    largest = max([1.0, *(figure["value"] for figure in gains)])
    return 1.05 * min(2 * largest, max([largest, *(figure["high"] or 0.0 for figure in gains)]))


def bars(title: str, counts: list[int], x_label: str) -> Markup:
    """One bar a count, from 0 on."""
    total, most = sum(counts) or 1, max(counts, default=0) or 1
    step, room = (WIDTH - LEFT) / max(len(counts), 1), HEIGHT - BELOW - 20
    parts = []
    for index, count in enumerate(counts):
        tall, x = room * count / most, LEFT + index * step
        parts.append(
            f'<rect class="bar" x="{x + step * 0.12:.1f}" y="{20 + room - tall:.1f}" width="{step * 0.76:.1f}" '
            f'height="{tall:.1f}"><title>{index}: {count} of {total}</title></rect>'
        )
        parts += [_text(x + step / 2, HEIGHT - BELOW + 14, index)]
        if count:
            parts.append(_text(x + step / 2, 15 + room - tall, f"{count / total:.0%}"))
    parts.append(_text(LEFT + (WIDTH - LEFT) / 2, HEIGHT - 4, x_label))
    return _svg(title, "".join(parts))


def rates(title: str, series: dict[str, list[dict]], x_label: str, few: int) -> Markup:
    """Lines of rates by place 1, 2, ..., with bands; points of fewer than `few` trials are faint."""
    most = max((len(points) for points in series.values()), default=0)
    room, step = HEIGHT - BELOW - 12, (WIDTH - LEFT - 20) / max(most, 1)

    def at(index: int, rate: float) -> tuple[float, float]:
        return LEFT + (index + 0.5) * step, 12 + room * (1 - rate)

    parts = []
    for mark in (0.0, 0.5, 1.0):
        y = at(0, mark)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{mark:.0%}", "end"))
    for number, (name, points) in enumerate(series.items()):
        upper = [at(index, point["high"]) for index, point in enumerate(points)]
        lower = [at(index, point["low"]) for index, point in enumerate(points)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower[::-1])
        line = " ".join("{:.1f},{:.1f}".format(*at(index, point["value"])) for index, point in enumerate(points))
        parts.append(
            f'<polygon class="band s{number}" points="{band}"/><polyline class="line s{number}" points="{line}"/>'
        )
        for index, point in enumerate(points):
            x, y = at(index, point["value"])
            faint = " faint" if point["of"] < few else ""
            parts.append(
                f'<circle class="s{number}{faint}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(name)}, depth '
                f"{index + 1}: {point['value']:.1%} of {point['of']}</title></circle>"
            )
    parts += [_text(at(index, 0)[0], HEIGHT - BELOW + 14, index + 1) for index in range(most)]
    parts.append(_text(LEFT + (WIDTH - LEFT) / 2, HEIGHT - 4, x_label))
    return _svg(title, "".join(parts))


def places(parents: list[int]) -> dict[int, tuple[int, float]]:
    """(depth, row) of each node of a tree: leaves one below the other, a parent in the middle of its children."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    cells: dict[int, tuple[int, float]] = {}
    leaves = 0
    stack = [(0, 0, False)]
    while stack:  # children first, so that a parent stands between them
        node, depth, seen = stack.pop()
        if not children[node]:
            cells[node], leaves = (depth, leaves), leaves + 1
        elif seen:
            cells[node] = depth, sum(cells[child][1] for child in children[node]) / len(children[node])
        else:
            stack.append((node, depth, True))
            stack += [(child, depth + 1, False) for child in reversed(children[node])]
    return cells


def tree(title: str, parents: list[int], use: list[int], kept: list[int]) -> Markup:
    """A drafted tree from the left to the right, a node's shade its use; what is not kept is dashed."""
    cells = places(parents)
    deep = 1 + max(depth for depth, _ in cells.values())
    leaves = 1 + max(row for _, row in cells.values())
    height = max(60, round(22 * leaves) + 16)
    spot = {node: (20 + depth * (WIDTH - 60) / max(deep - 1, 1), 18 + row * 22) for node, (depth, row) in cells.items()}
    parts = []
    for node, parent in enumerate(parents):
        (x, y), dashed = spot[node], "" if node in kept else " dead"
        if parent >= 0:
            a, b = spot[parent]
            parts.append(f'<line class="edge{dashed}" x1="{a:.1f}" y1="{b:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>')
    for node in range(len(parents)):
        (x, y), dashed, share = spot[node], "" if node in kept else " dead", use[node] / use[0]
        parts.append(f'<circle class="paper" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        parts.append(
            f'<circle class="node{dashed}" cx="{x:.1f}" cy="{y:.1f}" r="8" fill-opacity="{share:.3f}">'
            f"<title>node {node}: accepted in {use[node]} of {use[0]} steps ({share:.1%})</title></circle>"
        )
        if share >= 0.005 and node:
            parts.append(_text(x + 11, y + 4, f"{share:.0%}", "start"))
    return _svg(title, "".join(parts), WIDTH, height)


def stacked(title: str, parts: dict[str, float]) -> Markup:
    """Shares of one whole, side by side."""
    total, x, out = sum(parts.values()) or 1.0, 0.0, []
    for number, (name, value) in enumerate(parts.items()):
        wide = WIDTH * value / total
        out.append(
            f'<rect class="s{number}" x="{x:.1f}" y="4" width="{wide:.1f}" height="26">'
            f"<title>{escape(name)}: {value:.3f} s, {value / total:.1%}</title></rect>"
        )
        x += wide
    return _svg(title, "".join(out), WIDTH, 34)
