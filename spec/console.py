"""Terminal output: streamed text in which accepted drafts are coloured, waits, tables, and a summary line."""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from .trace import COMPILING, WAIT, Event

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEN = "\033[1;38;5;28m"  # dark and bold: a terminal's own green cannot be read on white
BOLD, PLAIN = "\033[1m", "\033[0m"


def colours(stream: TextIO | None = None) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) not set."""
    return (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")


def one_line(error: Exception, most: int = 200) -> str:
    """What an error of somebody else says, on one line and cut at `most` letters, to stand in a sentence of ours."""
    return " ".join(str(error).split())[:most]


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line on stderr for a wait: `what` as it begins, its seconds as it ends."""
    begun = time.perf_counter()
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except Exception:
        print(" failed", file=sys.stderr)
        raise
    print(f" {time.perf_counter() - begun:.0f} s", file=sys.stderr)


@contextmanager
def quietly() -> Iterator[None]:
    """Transformers and the model hub draw no progress bars in the block, nor a line for each retry."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    shown, heard = logging.is_progress_bar_enabled(), hub.get_verbosity()
    if shown:
        logging.disable_progress_bar()
    hub.set_verbosity_error()
    try:
        yield
    finally:
        hub.set_verbosity(heard)
        if shown:
            logging.enable_progress_bar()


class Bar(tqdm):
    """A progress bar on a terminal, to be used in a `with` block. Where that ends in an error the bar goes, so that the
    sentence that follows stands alone."""

    def __init__(self, *values: Any, **options: Any):
        super().__init__(*values, **{"file": sys.stderr, "dynamic_ncols": True, "disable": None, **options})

    def close(self) -> None:
        if isinstance(sys.exception(), Exception):
            self.leave = False
        super().close()


class Streamer:
    """Prints a row's tokens as they are committed: accepted drafts green, the target's own tokens plain.

    Text that the next token may still change (an incomplete character) is held back.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", coloured: bool):
        self.tokenizer = tokenizer
        self.coloured = coloured
        self.tokens: list[int] = []
        self.shown = ""
        self.line = ""  # what stands on the last line

    def on_step(self, events: list[Event]) -> None:
        for event in events:
            for index, token in enumerate(event.committed):
                self._put(token, accepted=index < len(event.accepted))
        sys.stdout.flush()

    def _put(self, token: int, accepted: bool) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("�"):
            return
        new, self.shown = text[len(self.shown) :], text
        if text.endswith("\n"):  # nothing before a line break changes any more
            self.tokens, self.shown = [], ""
        self.line = (self.line + new).rpartition("\n")[2]
        print(f"{GREEN}{new}{PLAIN}" if self.coloured and accepted and new else new, end="")

    def end(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        print(text[len(self.shown) :])


class Progress:
    """A line on the terminal for each step of a streamed target, which takes seconds: the tokens so far, how long the
    step waited for weights, and how fast they came. It stands below the text, as long as nothing is written there;
    where there is no terminal, nothing is shown."""

    def __init__(self, limit: int):
        self.limit, self.steps, self.tokens = limit, 0, 0
        self.on, self.below, self.shown = sys.stderr.isatty(), sys.stdout.isatty(), False

    def show(self, events: list[Event], line: str = "") -> None:
        """Show what the step of `events` brought. `line` is what has been written to the last line of the text."""
        self.steps += 1
        self.tokens += sum(len(event.committed) for event in events)
        columns = shutil.get_terminal_size().columns
        if not self.on or (self.below and ends_full(line, columns)):
            return
        said = step_line(self.steps, self.tokens, self.limit, events)[: columns - 1]
        sys.stdout.flush()
        # Down a line, so that there is one, up again; keep the place, write on the line below, and come back.
        around = ("\033D\033[A\0337\033[B\r\033[K", "\0338") if self.below else ("\r\033[K", "")
        print(said.join(around), end="", file=sys.stderr, flush=True)
        self.shown = True

    def clear(self) -> None:
        """To be called before anything else is written."""
        if self.shown:
            print("\033[J" if self.below else "\r\033[K", end="", file=sys.stderr, flush=True)
        self.shown = False


def ends_full(line: str, columns: int) -> bool:
    """Whether the last row of a terminal that `line` takes is full: the cursor stands between two rows then."""
    column = 0
    for letter in line:
        wide = 0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        column = wide if column + wide > columns else column + wide
    return column == columns


def step_line(step: int, tokens: int, limit: int, events: list[Event]) -> str:
    """Such as `step 7: 46 of 64 tokens (+6), 4.1 s (3.2 s waiting for weights), 0.79 GB/s`."""
    seconds, fetched = events[0].seconds, events[0].fetched
    new = sum(len(event.committed) for event in events)
    said = f"step {step}: {tokens} of {limit} tokens (+{new}), {sum(seconds.values()):.1f} s"
    said += f" ({seconds.get(WAIT, 0.0):.1f} s waiting for weights)"
    if fetched is not None and fetched.seconds > 0:
        said += f", {fetched.bytes / fetched.seconds / 1e9:.2f} GB/s"
    return said


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first on the left, the others on the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary_line(summary: dict, tokens: int, seconds: float) -> str:
    """Tokens per second of decoding steps, tokens per step and acceptance, with their denominators; `seconds` are of
    the whole call, which also reads the prompt and may compile."""
    stepping = sum(spent for phase, spent in summary["seconds"].items() if phase != COMPILING)
    rate = f" ({tokens / stepping:.1f} tokens/s)" if stepping else ""
    parts = [f"{tokens} tokens in {stepping:.2f} s of steps{rate}, {seconds:.2f} s in all"]
    if summary["num_spec_steps"]:
        parts.append(f"{summary['tokens_per_step']:.2f} tokens per step ({summary['num_spec_steps']} steps)")
    if summary["num_draft_tokens"]:
        accepted, drafted = summary["num_accepted_draft_tokens"], summary["num_draft_tokens"]
        parts.append(f"{summary['draft_acceptance_rate']:.1%} of drafted tokens accepted ({accepted} of {drafted})")
    if summary["weights_bytes"] is not None:
        parts.append(fetched_line(summary))
    return "; ".join(parts)


def fetched_line(summary: dict) -> str:
    """What the steps of a streamed target waited and fetched."""
    said = f"waited {summary['seconds'].get(WAIT, 0.0):.1f} s for weights, {summary['weights_bytes'] / 1e9:.2f} GB"
    if summary["weights_bandwidth"] is not None:
        said += f" at {summary['weights_bandwidth'] / 1e9:.2f} GB/s"
    if summary["weights_hidden"] is not None:
        said += f" ({summary['weights_hidden']:.0%} of the shorter of fetching and working ran beside the other)"
    return said
