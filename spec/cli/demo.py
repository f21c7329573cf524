"""`paceline demo`: a few real prompts on a real model, with and without speculation, side by side."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..bench.divergence import margin, parting
from ..console import Streamer, colours
from ..engines.executors import LONG_RUN, choose
from ..generate import SpeculativeOutput, generate
from ..proposal import Drafter
from ..trace import Event
from . import words
from .commands import encode, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = {
    "rewrite code": (
        "Rename the variable `x` to `count` in this code and print the whole code again:\n\n"
        "def total(items):\n    x = 0\n    for item in items:\n        if item.price > 0:\n"
        "            x = x + item.price\n        else:\n            x = x - item.discount\n    return x\n"
    ),
    "correct a text": (
        "Copy this text and correct its spelling mistakes: The river Rhone rises in the Swiss Alps and flows "
        "trough Lake Geneva and southeastern France before it reaches the Mediteranean Sea. Near its mouth at "
        "Arles, the river Rhone divides into two branches, the Great Rhone and the Little Rhone."
    ),
    "answer a question": "Why is the sky blue during the day and red in the evening?",
}


def demo(args: Namespace) -> None:
    if args.drafter == "none":
        raise ValueError("--drafter none leaves nothing to show; choose a drafter, for instance ngram")
    model, tokenizer, drafter = load(args)
    assert drafter is not None
    if args.executor == "auto":
        args.executor = choose("auto", model, LONG_RUN, capturable=True, compiled_before=False)
    coloured, dtype, chat = colours(), str(model.dtype).removeprefix("torch."), bool(tokenizer.chat_template)
    print(words.introduction(args.model, dtype, drafter.name, coloured), flush=True)
    prompts = {title: encode(tokenizer, text, chat, model.device) for title, text in PROMPTS.items()}
    _warm_up(args, model, drafter, list(prompts.values()))
    answers = []
    for title, prompt in prompts.items():
        print(f"\n{words.heading(title, PROMPTS[title], coloured)}\n", flush=True)
        answers.append(_answer(args, model, drafter, title, prompt, Streamer(tokenizer, coloured)))
    print(f"\n{words.conclusion(answers, dtype)}\n\n{words.next_steps(args, drafter.name, chat)}", flush=True)


def _warm_up(args: Namespace, model: "PreTrainedModel", drafter: Drafter, prompts: list[dict]) -> None:
    """A step of each way on each prompt, the longest first, so that what is made on first use is there."""
    if args.executor == "compiled":
        said = "two steps (with and without the drafter) are compiled"
        print(f"\n{said}; it is kept on this machine, and --executor eager does without", file=sys.stderr)
    for prompt in sorted(prompts, key=lambda prompt: -prompt["input_ids"].shape[1]):
        for warmed in (drafter, None):  # a tree that the drafter cannot fill ends it at once
            _generate(args, model, prompt, warmed, stopping_criteria=[After(0)])


def _answer(
    args: Namespace, model: "PreTrainedModel", drafter: Drafter, title: str, prompt: dict, streamer: Streamer
) -> words.Answer:
    """Answer a prompt without the drafter, and with it, streaming."""
    plain, plain_seconds = _timed(args, model, prompt, None)
    fast, seconds = _timed(args, model, prompt, drafter, streamer.on_step)
    streamer.end()
    width = prompt["input_ids"].shape[1]
    difference = None
    if not torch.equal(plain.sequences, fast.sequences):
        difference = _difference(model, plain.sequences[0], fast.sequences[0], width)
    assert fast.trace is not None
    steps = fast.trace.summary()["num_spec_steps"]
    counts = plain.sequences.shape[1] - width, fast.sequences.shape[1] - width
    return words.Answer(title, counts[0], plain_seconds, counts[1], seconds, steps, difference)


def _generate(
    args: Namespace, model: "PreTrainedModel", prompt: dict, drafter: Drafter | None, **options
) -> SpeculativeOutput:
    options |= {"do_sample": False, "max_new_tokens": args.max_new_tokens, "return_dict_in_generate": True}
    tree = args.tree if drafter is not None else None
    out = generate(model, **prompt, drafter=drafter, tree=tree, executor=args.executor, **options)
    assert isinstance(out, SpeculativeOutput)
    return out


def _timed(
    args: Namespace,
    model: "PreTrainedModel",
    prompt: dict,
    drafter: Drafter | None,
    on_step: Callable[[list[Event]], None] | None = None,
) -> tuple[SpeculativeOutput, float]:
    started = time.perf_counter()
    out = _generate(args, model, prompt, drafter, on_step=on_step)
    return out, time.perf_counter() - started


def _difference(model: "PreTrainedModel", plain: torch.Tensor, fast: torch.Tensor, width: int) -> str:
    """Where two greedy texts part, and how close the two best logits are there."""
    position = parting(plain.tolist(), fast.tolist())
    assert position is not None
    apart, spacing = margin(model, plain[:position].tolist())
    name = str(model.dtype).removeprefix("torch.")
    return (
        f"differs from token {position - width + 1} on, where the two best logits are "
        f"{apart:.3g} apart; {name} numbers of that size are {spacing:.2g} apart"
    )


class After:
    """A stopping criterion: a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)
