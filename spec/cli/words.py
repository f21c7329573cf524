"""What `paceline demo` says to somebody who sees speculation for the first time. Knows nothing of decoding."""

import shlex
import shutil
import textwrap
from argparse import Namespace
from dataclasses import dataclass

from ..console import BOLD, GREEN, PLAIN, table

INTRODUCTION = (
    "Speculative decoding: a cheap drafter guesses the next tokens (pieces of words), and the model checks all of them "
    "at once, where it would else write one at a time. Right guesses save time and wrong ones are thrown away, so the "
    "text is exactly the model's own."
)
PROMPT = "Why do cats purr?"  # of the commands to go on with
WIDTH = 100  # of a line, where the terminal is as wide
_ALIKE = 0.03  # relative difference of two speeds that a busy machine makes by itself


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt answered twice: plainly, and with the drafter."""

    title: str
    plain_tokens: int
    plain_seconds: float
    tokens: int
    seconds: float
    steps: int
    difference: str | None  # where the texts part, and why; None where they are the same

    @property
    def speedup(self) -> float:
        return self.plain_seconds / self.plain_tokens / (self.seconds / self.tokens)

    def row(self) -> list[str]:
        plain, fast = self.plain_tokens / self.plain_seconds, self.tokens / self.seconds
        same = "no" if self.difference else "yes"
        figures = f"{plain:.1f}", f"{fast:.1f}", f"{self.speedup:.2f}x", f"{self.tokens / self.steps:.2f}"
        return [self.title, *figures, same]


def together(answers: list[Answer]) -> Answer:
    """All of them as one, as if the plain answers were as long as the drafted ones."""
    plain_seconds = sum(answer.plain_seconds * answer.tokens / answer.plain_tokens for answer in answers)
    tokens, seconds = sum(answer.tokens for answer in answers), sum(answer.seconds for answer in answers)
    difference = next((answer.difference for answer in answers if answer.difference), None)
    steps = sum(answer.steps for answer in answers)
    return Answer("together", tokens, plain_seconds, tokens, seconds, steps, difference)


def introduction(model: str, dtype: str, drafter: str, coloured: bool) -> str:
    shown = (
        f"Three prompts are answered twice by {model} in {dtype}, without the drafter ({drafter}) and with it. You see "
        "the answers with it"
    )
    key = f": {GREEN}green{PLAIN} was guessed by the drafter and is right, the rest was written by the model itself"
    return f"{_filled(INTRODUCTION)}\n\n{_filled(shown + key * coloured)}."


def heading(title: str, prompt: str, coloured: bool) -> str:
    """A title and the first line of its prompt, in one line."""
    room = min(shutil.get_terminal_size().columns, WIDTH) - len(title) - 2
    shown = textwrap.shorten(prompt.splitlines()[0], room, placeholder=" ...")
    return f"{BOLD * coloured}{title}{PLAIN * coloured}: {shown}"


def conclusion(answers: list[Answer], dtype: str) -> str:
    """The table, how much faster against what, whether the texts are the same, and where there is more."""
    whole = together(answers)
    header = ["prompt", "tokens/s without", "with drafter", "speed-up", "tokens per step", "same text"]
    lines = [_speed(whole)]
    slower = [f"{answer.title!r} ({answer.speedup:.2f}x)" for answer in answers if answer.speedup < 1 - _ALIKE]
    if slower and whole.speedup >= 1 - _ALIKE:
        lines.append(f"It was slower on {' and '.join(slower)}: too few guesses were right to pay for checking them.")
    if not whole.difference:
        lines.append("Each text is the same with and without the drafter, token for token.")
    lines += [f"{answer.title}: {answer.difference}" for answer in answers if answer.difference]
    if whole.difference and dtype != "float32":
        lines.append("Lower precision rounds such ties differently in a longer forward; compare --dtype float32.")
    lines.append("Three prompts are few. Many kinds of text, and transformers beside it: docs/benchmarks.md.")
    return "\n".join([table(header, [answer.row() for answer in [*answers, whole]]), "", *map(_filled, lines)])


def _filled(text: str) -> str:
    return textwrap.fill(text, min(shutil.get_terminal_size().columns, WIDTH))


def _speed(whole: Answer) -> str:
    against = "without, by the same code on this machine"
    if whole.speedup > 1 + _ALIKE:
        return f"With the drafter the model was {whole.speedup:.2f} times as fast as {against}."
    if whole.speedup >= 1 - _ALIKE:
        return f"With the drafter the model was about as fast ({whole.speedup:.2f}x) as {against}."
    return (
        f"With the drafter the model was slower, {whole.speedup:.2f} times as fast as {against}: checking several "
        "tokens costs more here than right guesses save. paceline plan, below, finds the tree that pays, if any does."
    )


def next_steps(args: Namespace, drafter: str, chat: bool) -> str:
    """What to do next with what has just been shown: commands as they are to be typed, and why."""
    target = _given(args, model="smollm2-135m")
    model = target + " --trust-remote-code" * args.trust_remote_code
    model += _given(args, dtype="auto", weights="16", device=None, executor="eager")
    chosen = _given(args, drafter="auto")
    method = shlex.quote(drafter if args.drafter == "auto" else args.drafter)
    recipe = "smollm2-135m-hydra data.folder=data/mine"
    recipe += f" {shlex.quote(f'target.model={args.model}')}" if target else ""
    patience = ", which compiles steps of many sizes and takes minutes" * (args.executor == "compiled")
    steps = {
        "Try a prompt of your own:": [
            f'paceline generate --{"chat" if chat else "prompt"} "{PROMPT}"{model}{chosen}{_given(args, tree=None)}'
        ],
        "See how much faster your prompts become, one on each line of a file:": [
            f'echo \'{{"prompt": "{PROMPT}"}}\' >> prompts.jsonl',
            f"paceline bench prompts.jsonl -o run.jsonl --methods {method}{model}",
            "paceline report run.jsonl -o report.html",
        ],
        f"Find the tree of guesses that is best for them here, for --tree auto{patience}:": [
            f"paceline plan --calibrate prompts.jsonl{model}{chosen}"
        ],
        "See what training a drafter of your own takes:": [
            f"paceline data generate prompts.jsonl -o answers.jsonl{target}",
            f"paceline data prepare answers.jsonl -o data/mine{target}",
            f"paceline train {recipe} --plan",
        ],
    }
    return "\n".join(
        line for why, commands in steps.items() for line in [why, *(f"    {command}" for command in commands)]
    )


def _given(args: Namespace, **defaults: str | None) -> str:
    """The options that differ from these defaults, to be typed again."""
    given = {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items())
