"""The commands `generate` and `models`, and what they share with `demo`."""

import json
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

import torch

from ..console import Progress, Streamer, colours, summary_line, table
from ..data.content import decoded, read_text
from ..files import cache_folder
from ..generate import SpeculativeOutput
from ..generate import generate as generate_tokens
from ..prompts import left_padded, pad_id, templated_ids
from ..proposal import Drafter
from ..stream.streamer import streamer_of
from ..target.load import NAMED, load_target
from ..trace import Event, Trace
from ..verify import check_rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(args: Namespace) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model and tokenizer that the options name."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = {"weights": args.weights, "stream": args.stream, "resident": args.resident}
    return load_target(args.model, args.dtype, device, args.trust_remote_code, **where)


def load(args: Namespace) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", Drafter | None]:
    """The model, tokenizer and drafter that the options name."""
    if args.drafter == "none" and getattr(args, "tree", None) is not None:
        raise ValueError(f"--tree {args.tree} is of guesses and --drafter none makes none; leave one of them out")
    model, tokenizer = load_model(args)
    drafter = None
    if args.drafter != "none":
        from ... import load_drafter

        drafter = load_drafter(args.drafter, model, args.draft_weights, tokenizer)
    return model, tokenizer, drafter


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool, device: torch.device) -> dict:
    """Token ids and mask of a prompt, both (1, P), through the chat template where `chat`."""
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat needs a model with a chat template and this one has none; use --prompt")
    ids = templated_ids(tokenizer, [{"role": "user", "content": text}]) if chat else tokenizer(text)["input_ids"]
    return left_padded([ids], pad_id(tokenizer), device)


def check_drawing(args: Namespace) -> None:
    """Refuse a temperature or a rule that is none before anything is loaded."""
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature} is not a number of at least 0; 0 is greedy")
    check_rule(args.verify)


def generate(args: Namespace) -> None:
    given = args.prompt if args.prompt is not None else args.chat
    text = _read(args.prompt_file) if given is None else decoded(given.encode(errors="surrogateescape"), "the prompt")
    if not text:
        raise ValueError("the prompt is empty; give it at least one character")
    check_drawing(args)
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p} is not above 0 and at most 1")
    model, tokenizer, drafter = load(args)
    sampling: dict = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        args.seed = int(torch.randint(2**53, ())) if args.seed is None else args.seed
    prompt = encode(tokenizer, text, args.chat is not None, model.device)
    streamed = streamer_of(model) is not None
    telling = Telling(args, tokenizer, Progress(args.max_new_tokens) if streamed else None)
    try:
        out = generate_tokens(
            model,
            **prompt,
            drafter=drafter,
            tree=args.tree,
            verify=args.verify,
            seed=args.seed,
            executor=args.executor,
            trace_file=args.trace,
            max_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
            on_step=telling.on_step,
            **sampling,
        )
    except BaseException as error:  # the text so far is kept whatever stopped it
        if telling.events:
            telling.end(stopped="Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or repr(error))
        raise
    assert isinstance(out, SpeculativeOutput) and out.trace is not None
    telling.events = out.trace.events
    telling.end()


class Telling:
    """What `paceline generate` prints: the text as it grows and a line of figures, or one JSON object; also of a text
    that was broken off."""

    def __init__(self, args: Namespace, tokenizer: "PreTrainedTokenizerBase", progress: Progress | None):
        self.args, self.tokenizer, self.progress = args, tokenizer, progress
        self.streamer = None if args.json else Streamer(tokenizer, colours())
        self.events: list[Event] = []
        self.started = time.perf_counter()

    def on_step(self, events: list[Event]) -> None:
        self.events += events
        if self.progress is not None:
            self.progress.clear()
        if self.streamer is not None:
            self.streamer.on_step(events)
        if self.progress is not None:
            self.progress.show(events, "" if self.streamer is None else self.streamer.line)

    def end(self, stopped: str = "") -> None:
        args, seconds, summary = self.args, time.perf_counter() - self.started, Trace(self.events).summary()
        tokens = [token for event in self.events for token in event.committed]
        if self.progress is not None:
            self.progress.clear()
        if self.streamer is None:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            said = {"text": text, "tokens": tokens, "seed": args.seed, "total_seconds": seconds, **summary}
            print(json.dumps({**said, "stopped": stopped} if stopped else said))
            return
        self.streamer.end()
        drawn = f"; seed {args.seed}" if args.temperature > 0 else ""
        print(summary_line(summary, len(tokens), seconds) + drawn, file=sys.stderr)


def _read(path: str) -> str:
    if path != "-":
        return read_text(path)
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    return decoded(data, "standard input")


def models(args: Namespace) -> None:
    rows = []
    for name, model in NAMED.items():
        cached = cache_folder() / name
        where = str(cached) if (cached / "config.json").is_file() else "not fetched yet"
        rows.append([name, model.hub_id, where])
    print(table(["name", "hub id", "in the cache"], rows))
    print("\nAny folder, GGUF file or hub id of a causal LM works too; a numerical self-test decides on first use.")
