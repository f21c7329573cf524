"""The commands: grouped by what a person wants, with what each does, its options and an example."""

import argparse
from collections import namedtuple

from ... import __version__
from . import options
from .parser import Parser, add_command

Command = namedtuple("Command", "module about options example")  # its function has its name

GROUPS = {
    "See it work": {
        "demo": Command(
            ".demo", "fetch a small model and show it with and without speculation", options.demo,
            "paceline demo",
        ),
        "generate": Command(
            ".commands", "continue a prompt, and tell what speculation brought", options.generate,
            'paceline generate --chat "Why is the sky blue?"',
        ),
        "check": Command(
            "..check.command", "check that every promise holds on this machine, and time it", options.check,
            "paceline check --shape qwen3-0.6b -o check.json",
        ),
    },
    "Serve it": {
        "serve": Command(
            "..serve.command", "serve a model to OpenAI clients, several texts at a time", options.serve,
            "paceline serve --model smollm2-135m --drafter auto --max-rows 8",
        ),
    },
    "Measure and decide": {
        "bench": Command(
            "..bench.measure", "measure methods on prompts, in turns, into a run file", options.bench,
            "paceline bench prompts.jsonl -o run.jsonl --methods ngram transformers-lookup",
        ),
        "report": Command(
            "..bench.report", "make a page of run files: how much faster, where and why", options.report,
            "paceline report run.jsonl -o report.html",
        ),
        "compare": Command(
            "..bench.report", "compare two run files or checks; exit code 1 if B is worse", options.compare,
            "paceline compare before.jsonl after.jsonl",
        ),
        "plan": Command(
            ".planning", "find a drafter's best tree on this machine, for --tree auto", options.plan,
            "paceline plan --drafter ngram --calibrate prompts.jsonl\n"
            'paceline generate --drafter ngram --tree auto --chat "Why is the sky blue?"',
        ),
        "profile": Command(
            ".planning", "time steps on this machine, by tree size and drafting depth", options.profile,
            "paceline profile --drafter ngram",
        ),
    },
    "Train a drafter": {
        "data": Command(
            "...training.data.command", "make training data: the target's own text, in rows", options.data,
            "paceline data generate prompts.jsonl -o answers.jsonl\n"
            "paceline data prepare answers.jsonl -o data/mine",
        ),
        "train": Command(
            "...training.train", "train a drafter as a configuration says", options.train,
            "paceline train smollm2-135m-hydra data.folder=data/mine --plan",
        ),
        "evaluate": Command(
            "...training.evaluate", "measure a drafter on prompts and keep the result with it", options.evaluate,
            "paceline evaluate runs/smollm2-135m-hydra/best --prompts prompts.jsonl",
        ),
        "export": Command(
            "...drafters.formats.export", "write a drafter in the form that an engine reads", options.export,
            "paceline export smollm2-135m-draft --to vllm -o draft-for-vllm",
        ),
        "push": Command(
            "...training.push", "upload a drafter folder to the model hub", options.push,
            "paceline push runs/smollm2-135m-hydra/best someone/my-drafter --private",
        ),
    },
    "Quantise a target": {
        "quantise": Command(
            "..quantise.command", "make a smaller target of 4 or 8 bits, and measure what that costs", options.quantise,
            "paceline quantise smollm2-135m -o smollm2-4bit --calibrate prompts.jsonl",
        ),
    },
    "Use published drafters": {
        "convert": Command(
            "...drafters.formats.convert", "make a folder with safetensors of a pickled drafter", options.convert,
            "paceline convert EAGLE3-Vicuna1.3-13B/pytorch_model.bin -o vicuna-eagle3",
        ),
    },
    "What there is": {
        "models": Command(
            ".commands", "list the models that have a short name, and where they are", options.nothing,
            "paceline models",
        ),
        "drafters": Command(
            "...drafters.shipped", "list the drafters of the package, with their numbers", options.nothing,
            "paceline drafters",
        ),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

_ABOUT = """\
Lossless speculative decoding for Hugging Face causal language models: a cheap
drafter guesses the next tokens, the model (the target) checks them at once, and
the text is exactly the target's own."""


def make_parser() -> Parser:
    parser = Parser(
        prog="paceline",
        usage="paceline [-h] [--version] [--debug] COMMAND ...",
        description=f"{_ABOUT}\n\n{_listed()}",
        epilog="Begin with paceline demo. paceline COMMAND --help tells about a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paceline {__version__}", help="print it, and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and all warnings")
    commands = parser.add_subparsers(dest="command", prog="paceline", metavar="COMMAND", help=argparse.SUPPRESS)
    for name, command in COMMANDS.items():
        add_command(commands, name, command.about, command.options, command.example)
    return parser


def _listed() -> str:
    width = max(map(len, COMMANDS))
    groups = [
        "\n".join([f"{title}:", *(f"  {name:{width}}  {command.about}" for name, command in group.items())])
        for title, group in GROUPS.items()
    ]
    return "\n\n".join(groups)
