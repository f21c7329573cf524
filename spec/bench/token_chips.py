"""The token trace of a report: what was accepted, supplied by the target, or rejected. Text of any kind is only shown.

Control characters, direction marks and lone surrogates are spelt out, so that they can neither hide nor reorder text.
"""

import unicodedata
from dataclasses import dataclass

from .runfile import Record

LONGEST = 120  # characters of one token or name
COMMAND = 2000  # of a command, which is to be repeated


@dataclass(frozen=True, slots=True)
class Chip:
    kind: str  # "accepted", "bonus" or "rejected"
    text: str
    title: str


def visible(text: str, longest: int = LONGEST) -> str:
    """`text` with what cannot be seen spelt out; at most `longest` characters of it."""
    cut = f"… ({len(text)} characters)" if len(text) > longest else ""
    return "".join(_shown(letter) for letter in text[:longest]) + cut


def _shown(letter: str) -> str:
    if letter == "\n":
        return "↵\n"
    if letter == " ":
        return letter
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(letter):04X}⟩"
    return letter


def chips(record: Record) -> list[Chip]:
    """The tokens of a text in order, and behind each step's accepted ones the first choice that was rejected."""
    out = []
    for event in record.events:
        for depth, node in enumerate(event.accepted, 1):
            siblings = [child for child, parent in enumerate(event.parents) if parent == event.parents[node]]
            about = f"step {event.step}, drafted at depth {depth}, choice {siblings.index(node) + 1}: accepted"
            out.append(Chip("accepted", piece(record, event.tokens[node]), about))
        last = event.accepted[-1] if event.accepted else 0
        offered = [c for c, parent in enumerate(event.parents) if parent == last and event.tokens[c] >= 0]
        if event.bonus is not None:
            if offered:
                about = f"step {event.step}, drafted at depth {len(event.accepted) + 1}, choice 1: rejected"
                out.append(Chip("rejected", piece(record, event.tokens[offered[0]]), about))
            out.append(Chip("bonus", piece(record, event.bonus), f"step {event.step}: the target's own token"))
    return out


def piece(record: Record, token: int) -> str:
    """What a token reads; its number where the run file does not say."""
    return visible(record.pieces.get(str(token), f"⟨{token}⟩"))
