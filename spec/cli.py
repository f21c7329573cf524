"""The command line: `paceline demo | generate | models`. Parsing only; commands load when they run.

A user's error ends in one line on stderr and exit code 2, Ctrl-C in exit code 130.
"""

import argparse
import os
import sys
from importlib import import_module

_COMMANDS = {
    "demo": ".demo",
    "generate": ".commands",
    "models": ".commands",
    "plan": ".planning",
    "profile": ".planning",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paceline", description="Lossless speculative decoding for Hugging Face causal language models."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fetch a small model and decode with and without speculation")
    _model_options(demo)
    demo.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N", help="per prompt (default 96)")

    generate = commands.add_parser("generate", help="continue a prompt, streaming, and print what speculation brought")
    _model_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="file with the text to continue; - is standard input")
    source.add_argument("--chat", metavar="TEXT", help="a user's message, put into the model's chat template")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="at most (default 128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus, when sampling (default 1)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling noise (default 0)")
    generate.add_argument(
        "--verify", default="match", metavar="RULE", help="match, residual or typical (default match)"
    )
    generate.add_argument("--trace", metavar="FILE", help="append one JSON line per step to FILE")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")

    plan = commands.add_parser("plan", help="plan the best tree for a drafter on this device, for tree='auto'")
    _model_options(plan)
    plan.add_argument("--calibrate", required=True, metavar="FILE", help="prompts: JSONL with 'turns' or 'prompt'")
    plan.add_argument("--prompts", type=_positive, default=24, metavar="N", help="how many of them (default 24)")
    plan.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="per prompt (default 64)")
    plan.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    plan.add_argument("--verify", default="match", metavar="RULE", help="match or residual (default match)")
    plan.add_argument("-o", "--output", metavar="FILE", help="write the plan here too, for --tree FILE.json")

    profile = commands.add_parser("profile", help="time steps on this device, by tree size and drafting depth")
    _model_options(profile)
    profile.add_argument("--compare", metavar="FILE", help="decode these prompts with, without and by transformers")
    profile.add_argument("--prompts", type=_positive, default=24, metavar="N", help="how many of them (default 24)")
    profile.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="per prompt (default 64)")

    commands.add_parser("models", help="list the models that have a short name, and where they are")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help="folder, short name or hub id")
    parser.add_argument("--drafter", default="ngram", metavar="NAME", help="ngram, a model, or none (default ngram)")
    parser.add_argument("--tree", metavar="SHAPE", help="chain:5, children per level like 4x2x1, FILE.json, auto")
    executors = ("auto", "eager", "compiled", "cuda_graph")
    parser.add_argument("--executor", default="eager", choices=executors, help="how steps are run (default eager)")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # One line for an error means that the libraries' own warnings and bars stay out of the way.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        command = getattr(import_module(_COMMANDS[args.command], __package__), args.command)
        command(args)
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"paceline: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
