"""`paceline report` and `paceline compare`: run files as a page, as Markdown, as JSON, as a picture of some steps, and
against each other.

One HTML file that needs nothing else: pictures inline, no script, no network.
"""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from importlib.resources import files

from jinja2 import Environment

from ..check.differences import compare_checks, read_check
from ..console import table
from ..files import write_output
from ..trace import WAIT
from . import drawing, picture, wording
from .analysis import FEW, analyse, check_comparable, paired
from .intervals import Interval, quotient_interval
from .runfile import Record, Run, read_run
from .token_chips import COMMAND, LONGEST, Chip, chips, visible
from .wording import best_of, identity, interval

STREAM = 96  # chips of the text that stands at the top
GAINS = {"speedup": "speed-up", "speedup_of_steps": "in steps alone", "over_transformers": "over transformers"}
OVERVIEW = ["method", "tokens/step", "tokens/s", *GAINS.values(), "identical texts"]
WEIGHTS = ["method", "waited, s", "of the steps' time", "fetched, GB", "GB/s", "hidden"]
HEADER = [
    "category", "prompts", "tokens", "tokens/step", "accepted / examined", "tokens/s", "plain tokens/s",
    *GAINS.values(),
]  # fmt: skip


def report(args: Namespace) -> None:
    """The command `paceline report`."""
    runs = [_read(path) for path in args.runs]
    figures = analyse(runs)
    asked = [path for path in (args.output, args.markdown, args.json, args.picture) if path]
    if not asked:
        args.markdown = "-"
    kinds = [
        (args.output, lambda: page(figures, runs)),
        (args.markdown, lambda: markdown(figures)),
        (args.json, lambda: json.dumps(figures, indent=1) + "\n"),
        (args.picture, lambda: drawn(figures, runs)),
    ]
    for path, text in [(path, make()) for path, make in kinds if path]:  # all are made before one is written
        write_output(path, text)
    if asked and "-" not in asked:
        print(f"{wording.conclusion(figures)}\nwritten: {', '.join(asked)}")


def _read(path: str) -> Run:
    run = read_run(path)
    if run.warning:
        print(run.warning, file=sys.stderr)
    return run


def page(figures: dict, runs: list[Run]) -> str:
    """The report as one HTML file."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"interval": interval, "visible": lambda value, *most: visible(str(value), *most)}
    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    drafted = [method for method in figures["methods"] if method["kind"] == "drafted"]
    return environment.from_string(source).render(
        **figures, words=wording, figures=figures, overview=[OVERVIEW, *overview(figures)], header=HEADER,
        weights=[WEIGHTS, *weights(figures)], lines=lines(figures), draw=drawing, few=FEW, drafted=drafted,
        texts=_texts(figures, runs), stream=STREAM, whole=COMMAND, megabytes=lambda size: f"{size / 1e6:,.1f}",
    )  # fmt: skip


def overview(figures: dict) -> list[list[str]]:
    """A table row for each method, of all prompts together."""
    rows = []
    for method in figures["methods"]:
        row, same = method["overall"], f"{method['identical']} / {method['compared']}" if method["compared"] else "–"
        rows.append([method["label"], _per_step(row), f"{row['rate']:.1f}", *_gains(row), same])
    return rows


def weights(figures: dict) -> list[list[str]]:
    """A table row for each method whose steps fetched the target's weights."""
    rows = []
    for method in figures["methods"]:
        summary = method["summary"]
        if summary["weights_bytes"] is not None:
            wait, spent = summary["seconds"].get(WAIT, 0.0), sum(summary["seconds"].values())
            size, speed = summary["weights_bytes"] / 1e9, summary["weights_bandwidth"]
            figures_of_method = [f"{wait:.1f}", _share(wait / spent), f"{size:.2f}", _number(speed and speed / 1e9)]
            rows.append([method["label"], *figures_of_method, _share(summary["weights_hidden"])])
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def lines(figures: dict) -> list[tuple[dict, list[list[str]]]]:
    """(method, table rows by category, then together and the mean over categories; where there is one category, the
    row of all prompts alone)."""
    plain = {method["label"]: method for method in figures["methods"]}
    out = []
    for method in figures["methods"]:
        prefix = method["label"].removesuffix(method["name"])
        baseline = plain.get(prefix + (method["baseline"] or method["name"]))
        baseline_rows = {row["name"]: row for row in [*baseline["categories"], baseline["overall"]]} if baseline else {}
        if len(method["categories"]) == 1:
            out.append((method, [_line(method["overall"], baseline_rows.get(method["overall"]["name"]))]))
            continue
        rows = [_line(row, baseline_rows.get(row["name"])) for row in [*method["categories"], method["overall"]]]
        means = method["macro"]
        shown = [_number(means["tokens_per_step"]), "", _number(means["rate"], 1), ""]
        gains = [_number(means[key]) for key in GAINS]
        out.append((method, [*rows, ["mean of categories", "", "", *shown, *gains]]))
    return out


def _line(row: dict, baseline: dict | None) -> list[str]:
    acceptance = f"{row['accepted']} / {row['examined']}" if row["examined"] else "–"
    rate = "–" if baseline is None else f"{baseline['rate']:.1f}"
    return [
        row["name"], str(row["prompts"]), str(row["tokens"]), _per_step(row), acceptance, f"{row['rate']:.1f}", rate,
        *_gains(row),
    ]  # fmt: skip


def _per_step(row: dict) -> str:
    return _number(row["tokens_per_step"] and row["tokens_per_step"]["value"])


def _gains(row: dict) -> list[str]:
    return [interval(row[key], "×") for key in GAINS]


def _number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def markdown(figures: dict) -> str:
    """The verdict and every table, to paste."""
    parts = [f"**{_cell(wording.verdict(figures), COMMAND)}**\n"]
    if beside := wording.particulars(figures):
        parts.append(f"{_cell(beside, COMMAND)}\n")
    parts.append(_table(OVERVIEW, overview(figures)))
    if fetched := weights(figures):
        parts.append(f"{wording.streaming(figures['setup'])}\n\n{_table(WEIGHTS, fetched)}")
    for method, rows in lines(figures):
        parts.append(f"### {_cell(method['label'])}\n")
        if method["compared"]:
            parts.append(f"{_cell(identity(method))}\n")
        parts.append(_table(HEADER, rows))
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    body = [header, ["---", *["---:"] * (len(header) - 1)], *[[_cell(cell) for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in body)


def _cell(text: str, longest: int = LONGEST) -> str:
    return visible(text, longest).replace("|", "\\|").replace("<", "&lt;")


def _texts(figures: dict, runs: list[Run]) -> list[tuple[str, list[Chip]]]:
    """The first three texts of the best method, token by token."""
    best = best_of(figures)
    kept = texts_with_pieces(best, runs) if best else []
    return [(f"{record.prompt} ({record.category})", chips(record)) for record in kept[:3]]


def texts_with_pieces(method: dict, runs: list[Run]) -> list[Record]:
    """The first turns of a method whose tokens its run file spells out."""
    name = method["name"]
    run = next(run for run in runs if method["label"] in (name, f"{run.path.rsplit('/', 1)[-1]}: {name}"))
    return [record for record in run.of(name) if record.pieces and record.turn == 0 and record.repeat == 0]


def drawn(figures: dict, runs: list[Run]) -> str:
    """Some steps of a text by the best method, or where plain decoding is missing by the first, as an SVG."""
    drafted = [method for method in figures["methods"] if method["kind"] == "drafted"]
    method = best_of(figures) or next(iter(drafted), None)
    texts = [record for record in texts_with_pieces(method, runs) if record.events] if method else []
    if method is None or not texts:
        raise ValueError(f"{runs[0].path} has no text of a drafter to draw; measure one with paceline bench --methods")
    about = f"{visible(figures['setup']['model'])} with {visible(method['label'])}, prompt {visible(texts[0].prompt)}"
    return picture.picture(texts[0], method["tokens_per_step"]["value"], about)


def compare(args: Namespace) -> int:
    """The command `paceline compare A B`: exit code 1 where a method of B is worse than in A beyond noise. Two files of
    `paceline check` are put side by side: exit code 1 where what holds in A fails in B.

    What is compared is the speed-up over the baseline of the same run (for plain decoding, over transformers), so that
    a machine that is slower today does not count, and tokens per step; tokens per second where there is neither."""
    checks = [read_check(path) for path in args.runs]
    if any(checks):
        return compare_checks(args.runs, checks)
    runs = [_read(path) for path in args.runs]
    check_comparable(runs)
    figures = [{method["name"]: method for method in run.methods} for run in runs]
    names = [name for name in figures[0] if name in figures[1] and figures[0][name]["kind"] != "transformers"]
    if not names:
        raise ValueError(f"{args.runs[0]} and {args.runs[1]} have no method of the same name; measure the same methods")
    rows, worse = [], []
    for name in names:
        for what, change in changes(runs[0], runs[1], name).items():
            bad = change.high is not None and change.high < 1
            worse += [name] * bad
            word = "worse" if bad else "better" if change.low is not None and change.low > 1 else "no difference seen"
            rows.append([visible(name), what, interval(asdict(change), "x"), word])
    print(table(["method", "figure", "B / A", "verdict"], rows))
    return 1 if worse else 0


def changes(a: Run, b: Run, name: str) -> dict[str, Interval]:
    """B's figures over A's, paired by prompt."""
    about = next(method for method in b.methods if method["name"] == name)
    transformers = next((method["name"] for method in b.methods if method["kind"] == "transformers"), None)
    anchor = about["baseline"] or transformers
    out = {}
    if anchor is not None and a.of(anchor) and b.of(anchor):
        sides = paired(b.of(anchor), b.of(name), a.of(anchor), a.of(name))
        (s, t), (s1, t1), (s2, t2), (s3, t3) = ([[u[i] for u in side] for i in (0, 1)] for side in sides)
        if s:
            out[f"speed-up over {anchor}"] = quotient_interval([s, t1, t2, s3], [t, s1, s2, t3])
    mine, before = paired(b.of(name), a.of(name))
    if mine and about["kind"] == "drafted":
        columns = [[u[i] for u in side] for side in (mine, before) for i in (1, 2)]
        out["tokens per step"] = quotient_interval([columns[0], columns[3]], [columns[1], columns[2]])
    if mine and not out:
        columns = [[u[i] for u in side] for side in (mine, before) for i in (0, 1)]
        out["tokens per second"] = quotient_interval([columns[1], columns[2]], [columns[0], columns[3]])
    if not out:
        raise ValueError(f"method {name!r} has no prompt in common in the two runs; measure the same prompts")
    return out
