"""The record of a check: findings in parts, and their output as JSON, tables and Markdown.

A finding is about one thing (an executor with a drafter, a tree size, a figure of the machine): its verdict (`holds`,
`fails` or `not here`), a reason, and figures. Figures are raw numbers in the units of `FIGURES`; only tables round
them. Knows nothing of models or of how anything is measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from ..console import table

HOLDS: "Verdict" = "holds"
FAILS: "Verdict" = "fails"
NOT_HERE: "Verdict" = "not here"
Verdict = Literal["holds", "fails", "not here"]


def _number(decimals: int, factor: float = 1.0) -> Callable[[float], str]:
    return lambda value: f"{value * factor:,.{decimals}f}"


# Every figure by name: its unit in the JSON, its heading in tables, and how tables show it.
FIGURES: dict[str, tuple[str, str, Callable]] = {
    "value": ("text", "value", str),
    "relative_error": ("1", "relative error", "{:.2g}".format),
    "texts": ("texts", "texts", str),
    "parted": ("texts", "parted", str),
    "margin": ("logits", "margin", "{:.2g}".format),
    "rounding": ("logits", "rounding", "{:.2g}".format),
    "tokens_per_step": ("tokens", "tokens per step", _number(2)),
    "step_seconds": ("s", "step ms", _number(2, 1e3)),
    "of_plain": ("1", "of plain", _number(2)),
    "forward_seconds": ("s", "forward ms", _number(2, 1e3)),
    "elsewhere": ("1", "elsewhere", "{:.1%}".format),
    "bytes_read": ("bytes", "MB read", _number(0, 1e-6)),
    "of_roofline": ("1", "of roofline", "{:.0%}".format),
    "draft_seconds": ("s", "drafting ms", _number(2, 1e3)),
    "token_seconds": ("s", "token ms", _number(2, 1e3)),
    "making_seconds": ("s", "made in s", _number(1)),
    "bytes_per_second": ("bytes/s", "GB/s", _number(1, 1e-9)),
    "flops": ("1/s", "GFLOP/s", _number(0, 1e-9)),
    "bytes": ("bytes", "GB", _number(2, 1e-9)),
    "nodes": ("nodes", "best tree: nodes", str),
    "depth": ("levels", "depth", str),
    "speedup": ("1", "speed-up", _number(2)),
    "tokens_per_second": ("1/s", "tokens/s", _number(0)),
    "loss": ("1", "loss", _number(3)),
}


@dataclass(slots=True)
class Finding:
    """`what` names the thing by labels; keys of `figures` are those of `FIGURES`, or raw lists that tables omit."""

    what: Mapping[str, str | int]
    verdict: Verdict = HOLDS
    reason: str = ""
    figures: dict = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """One of the five parts. `must_hold` parts decide the exit code."""

    name: str
    title: str
    must_hold: bool = False
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """`fails` where anything fails, `holds` where something holds and nothing fails."""
        verdicts = {finding.verdict for finding in self.findings}
        return FAILS if FAILS in verdicts else HOLDS if HOLDS in verdicts else NOT_HERE

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The findings as a table, header and rows, without those that are not here (see `notes`)."""
        shown = [finding for finding in self.findings if finding.verdict != NOT_HERE]
        labels = list(dict.fromkeys(label for finding in shown for label in finding.what))
        used = {name for finding in shown for name in finding.figures}
        names = [name for name in FIGURES if name in used]
        rows = []
        for finding in shown:
            cells = [_shown(name, finding.figures.get(name)) for name in names]
            rows.append([*(str(finding.what.get(label, "")) for label in labels), *cells, finding.verdict])
        return [*labels, *(FIGURES[name][1] for name in names), "verdict"], rows

    def notes(self) -> list[str]:
        """A line for each finding that is not here or has a reason."""
        return [
            f"{', '.join(str(value) for value in finding.what.values())}: {finding.verdict}: {finding.reason}"
            for finding in self.findings
            if finding.reason
        ]


def _shown(name: str, value) -> str:
    return "" if value is None else FIGURES[name][2](value)


@dataclass(slots=True)
class Check:
    """A whole check. `about` holds its circumstances: subject, machine, versions, command, commit, budget."""

    about: dict
    parts: list[Part]
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        return any(part.must_hold and part.verdict == FAILS for part in self.parts)

    @property
    def compared(self) -> bool:
        """Whether any drafted text was compared with plain decoding, and found to be the same."""
        findings = [finding for part in self.parts if part.must_hold for finding in part.findings]
        return any(f.verdict == HOLDS and f.what.get("promise") == "same text" for f in findings)

    def as_dict(self, sentence: str) -> dict:
        parts = [{**asdict(part), "verdict": part.verdict} for part in self.parts]
        units = {name: unit for name, (unit, _, _) in FIGURES.items()}
        return {
            "kind": "paceline-check", "version": 1, **self.about, "interrupted": self.interrupted,
            "sentence": sentence, "units": units, "parts": parts,
        }  # fmt: skip

    def text(self, part: Part) -> str:
        """One part for the terminal: its title and verdict over its table."""
        header, rows = part.rows()
        shown = [table(header, rows)] if rows else []
        return "\n".join([f"\n{part.title}: {part.verdict} ({part.seconds:.0f} s)", *shown, *part.notes()])

    def markdown(self, sentence: str) -> str:
        lines = [f"**{sentence}**\n"]
        for part in self.parts:
            header, rows = part.rows()
            lines.append(f"### {part.title}: {part.verdict}\n")
            if rows:
                lines += [f"| {' | '.join(map(_cell, row))} |" for row in [header, ["---"] * len(header), *rows]]
            lines += ["", *(f"- {_cell(note)}" for note in part.notes()), ""]
        return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
