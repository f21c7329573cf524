"""Comparison of two checks: changed verdicts, and all figures of both with their ratio.

Given the JSON files of `paceline check`.
"""

import json
from pathlib import Path

from ..console import table
from .record import FAILS, FIGURES, HOLDS


def read_check(path: str) -> dict | None:
    """A check as `paceline check -o` wrote it; None for any other file. Raises ValueError for a damaged check."""
    try:
        check = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # perhaps a run file; other readers will refuse the rest
    if not isinstance(check, dict) or check.get("kind") != "paceline-check":
        return None
    try:
        _findings(check)
        _heading(check)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged check ({type(error).__name__}: {error}); make it again") from error
    return check


def compare_checks(paths: list[str], checks: list[dict | None]) -> int:
    """Print A and B side by side; returns 1 where something that holds in A fails in B, else 0.

    Raises ValueError where one of the two files is no check."""
    known: list[dict] = []
    for path, check in zip(paths, checks):
        if check is None:
            raise ValueError(f"{path} is no file of paceline check and the other one is; compare two of a kind")
        known.append(check)
    for name, check in zip("AB", known):
        print(f"{name}: {_heading(check)}")
    (a, b), rows, broken = map(_findings, known), [], 0
    for key in [*a, *(key for key in b if key not in a)]:
        finding_a, finding_b = (side.get(key, {"verdict": "-", "figures": {}}) for side in (a, b))
        part, labels = key
        label = f"{part}: {', '.join(str(value) for _, value in labels)}"
        if finding_a["verdict"] != finding_b["verdict"]:
            broken += (finding_a["verdict"], finding_b["verdict"]) == (HOLDS, FAILS)
            rows.append([label, "verdict", finding_a["verdict"], finding_b["verdict"], ""])
        rows += _figure_rows(label, finding_a["figures"], finding_b["figures"])
    print(table(["what", "figure", "A", "B", "B / A"], rows))
    return 1 if broken else 0


def _heading(check: dict) -> str:
    subject, machine = check["subject"], check["machine"]
    where = machine["gpu"] if subject["device"].startswith("cuda") else machine["cpu"]
    return f"{subject['name']}, {subject['dtype']}, {where}, {check['created']}, commit {check['commit']}"


def _findings(check: dict) -> dict[tuple, dict]:
    """Verdict and figures of every finding, by (part, labels)."""
    return {
        (part["name"], tuple(finding["what"].items())): {
            "verdict": finding["verdict"], "figures": dict(finding["figures"])
        }
        for part in check["parts"]
        for finding in part["findings"]
    }  # fmt: skip


def _figure_rows(label: str, figures_a: dict, figures_b: dict) -> list[list[str]]:
    rows = []
    for name, (_, heading, show) in FIGURES.items():
        pair = figures_a.get(name), figures_b.get(name)
        if None in pair or (pair[0] == pair[1] and isinstance(pair[0], str)):
            continue
        numbers = all(isinstance(value, (int, float)) for value in pair)
        ratio = f"{pair[1] / pair[0]:.2f}" if numbers and pair[0] else ""
        rows.append([label, heading, show(pair[0]), show(pair[1]), ratio])
    return rows
