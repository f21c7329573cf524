"""The command line: `paceline demo | generate | plan | train ...`. Parsing only; commands load when they run.

A user's error ends in one line on stderr and exit code 2, Ctrl-C in exit code 130.
"""

import argparse
import os
import sys
import time
from importlib import import_module

_COMMANDS = {
    "demo": ".demo",
    "generate": ".commands",
    "models": ".commands",
    "plan": ".planning",
    "profile": ".planning",
    "bench": "..bench.measure",
    "report": "..bench.report",
    "compare": "..bench.report",
    "data": "...training.data.command",
    "train": "...training.train",
    "evaluate": "...training.evaluate",
    "push": "...training.push",
    "drafters": "...drafters.shipped",
    "check": "..check.command",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paceline", description="Lossless speculative decoding for Hugging Face causal language models."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fetch a small model and decode with and without speculation")
    _model_options(demo)
    demo.set_defaults(executor="auto")
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
    generate.add_argument("--seed", type=int, metavar="S", help="of the sampling noise (default: drawn, and printed)")
    generate.add_argument(
        "--verify", default="match", metavar="RULE", help="match, residual or typical (default match)"
    )
    generate.add_argument("--trace", metavar="FILE", help="append one JSON line per step to FILE")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")

    plan = commands.add_parser("plan", help="plan the best tree for a drafter on this device, for tree='auto'")
    _model_options(plan)
    source = plan.add_mutually_exclusive_group(required=True)
    source.add_argument("--calibrate", metavar="FILE", help="prompts: JSONL with 'turns' or 'prompt'")
    source.add_argument("--from", dest="run", metavar="RUN", help="take the acceptance that paceline bench measured")
    plan.add_argument("--prompts", type=_positive, default=24, metavar="N", help="how many of them (default 24)")
    plan.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="per prompt (default 64)")
    plan.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    plan.add_argument("--verify", default="match", metavar="RULE", help="match or residual (default match)")
    plan.add_argument("-o", "--output", metavar="FILE", help="write the plan here too, for --tree FILE.json")

    profile = commands.add_parser("profile", help="time steps on this device, by tree size and drafting depth")
    _model_options(profile)

    _check_parser(commands)
    _bench_parser(commands)
    _data_parser(commands)
    _drafter_parsers(commands)
    commands.add_parser("drafters", help="list the drafters that come with the package, with their numbers")
    commands.add_parser("models", help="list the models that have a short name, and where they are")
    return parser


def _drafter_parsers(commands) -> None:
    train = commands.add_parser("train", help="train a drafter as a configuration says")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a recipe in configs/")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optimisation.batch=16")
    train.add_argument("--plan", action="store_true", help="print parameters, tokens, steps, time and disk, and stop")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run.folder")

    evaluate = commands.add_parser("evaluate", help="measure a drafter on prompts and keep the result with it")
    evaluate.add_argument("drafter", metavar="DRAFTER", help="its folder; or ngram, a name or a model, with -o")
    _model_options(evaluate, drafter=False)
    evaluate.add_argument("--prompts", required=True, metavar="FILE", help="JSONL with 'turns' or 'prompt' to decode")
    evaluate.add_argument("--data", metavar="FOLDER", help="judge on the held-out rows of this prepared data")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="per prompt (default 128)")
    evaluate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    evaluate.add_argument("--verify", default="match", metavar="RULE", help="match or residual (default match)")
    evaluate.add_argument("-o", "--output", metavar="FILE", help="write here, and leave the drafter's folder as it is")

    push = commands.add_parser("push", help="upload a drafter folder to the model hub")
    push.add_argument("folder", metavar="FOLDER", help="with weights as safetensors, config.json and README.md")
    push.add_argument("hub_id", metavar="HUB-ID", help="owner/name")
    push.add_argument("--private", action="store_true", help="make the repository private, where it is new")


def _check_parser(commands) -> None:
    check = commands.add_parser("check", help="does every promise hold on this machine, and how fast is it here?")
    what = check.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="check with this model: folder, short name or hub id")
    shapes = "random weights in the shape of a known model, no download (default %(default)s)"
    what.add_argument("--shape", default="smollm2-135m", metavar="NAME", help=shapes)
    what.add_argument("--config", metavar="FILE", help="random weights in the shape of this config.json")
    check.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    check.add_argument("--dtype", default="auto", metavar="TYPE", help="float32, bfloat16, float16 or auto")
    check.add_argument("--executors", default="all", metavar="LIST", help="all, or some of them, with commas between")
    budget = "seconds that the check may take, within a fifth (default 100)"
    check.add_argument("--budget", type=_seconds, default=100.0, metavar="SECONDS", help=budget)
    check.add_argument("-o", "--output", metavar="FILE", help="everything that was found, raw, as JSON")
    check.add_argument("--markdown", metavar="FILE", help="the tables as Markdown; - is standard output")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return seconds


def _bench_parser(commands) -> None:
    bench = commands.add_parser("bench", help="measure methods on prompts, in turns, into a run file")
    bench.add_argument("prompts", metavar="PROMPTS", help="JSONL with turns or prompt, perhaps id and category")
    bench.add_argument("-o", "--output", required=True, metavar="RUN", help="JSONL to append to; a run goes on")
    bench.add_argument(
        "--methods", nargs="+", default=["ngram"], metavar="METHOD",
        help="ar, ngram, a draft model or drafter folder, transformers, transformers-lookup, "
        "transformers-assisted:drafter=FOLDER; each with :tree=4x2x1,rule=match,executor=compiled,temperature=0.7,"
        "name=SHORT. Plain decoding and transformers' generate() are always there",
    )  # fmt: skip
    bench.add_argument("--limit", type=_positive, metavar="N", help="take N prompts, spread over the file")
    bench.add_argument("--turns", type=_positive, metavar="N", help="and the first N turns of each (default: all)")
    bench.add_argument("--repeats", type=_positive, default=1, metavar="N", help="of every measurement (default 1)")
    bench.add_argument("--batch", type=_positive, default=1, metavar="N", help="texts at a time (default 1)")
    bench.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="per turn (default 64)")
    bench.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    bench.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling noise (default 0)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="that torch uses (default: its own choice)")
    _target_options(bench)

    report = commands.add_parser("report", help="make a page of run files: how much faster, on which text, and why")
    report.add_argument("runs", nargs="+", metavar="RUN", help="files of paceline bench, compared side by side")
    report.add_argument("-o", "--output", metavar="FILE", help="the page, one HTML file")
    report.add_argument("--markdown", metavar="FILE", help="the tables as Markdown; - is standard output")
    report.add_argument("--json", metavar="FILE", help="all figures; - is standard output")
    steps = "one SVG of some steps of a text with their drafted trees; docs/picture.svg was made so, of one prompt"
    report.add_argument("--picture", metavar="FILE", help=steps)

    compare = commands.add_parser("compare", help="compare two run files or checks; exit code 1 where B is worse")
    compare.add_argument("runs", nargs=2, metavar="FILE", help="A, then B: of paceline bench, or of paceline check")


def _data_parser(commands) -> None:
    data = commands.add_parser("data", help="make training data: the target's own text, prepared for the trainer")
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")

    generate = steps.add_parser("generate", help="let the target, or a server, answer prompts")
    _model_options(generate)
    generate.set_defaults(drafter="none", executor="auto")
    generate.add_argument("prompts", nargs="?", help="JSONL with turns, messages or prompt; a datasets folder or id")
    generate.add_argument("--source", choices=["self"], help="self: the target invents the user turns too")
    generate.add_argument("--beginnings", metavar="FILE", help="of invented turns: a text file, one on each line")
    generate.add_argument("--count", type=_positive, default=1000, metavar="N", help="of those (default 1000)")
    generate.add_argument("--split", default="train", metavar="NAME", help="of a data set (default train)")
    generate.add_argument("-o", "--output", metavar="FILE", help="JSONL to append to; a run that was killed goes on")
    generate.add_argument("--temperatures", default="0,0.7,1.0", metavar="LIST", help="default 0,0.7,1.0")
    generate.add_argument("--repeats", type=_positive, default=1, metavar="N", help="per sampled temperature")
    generate.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus (default 0.95)")
    generate.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="per turn (default 256)")
    generate.add_argument("--batch", type=_positive, default=16, metavar="N", help="texts at a time (default 16)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling noise (default 0)")
    generate.add_argument("--limit-tokens", type=_positive, metavar="N", help="begin no text beyond this many tokens")
    generate.add_argument("--exclude", metavar="FILE", help="prompts of this file are left out, wherever they occur")
    generate.add_argument("--server", metavar="URL", help="ask this OpenAI-compatible server (.../v1) instead")
    generate.add_argument(
        "--compare-transformers", action="store_true", help="time transformers' generate() beside ours, write nothing"
    )

    prepare = steps.add_parser("prepare", help="turn text and conversations into packed rows with a loss mask")
    prepare.add_argument("sources", nargs="+", help="JSONL with messages or text, text files, folders, mixtures (YAML)")
    prepare.add_argument("-o", "--output", required=True, metavar="FOLDER", help="data set to make")
    prepare.add_argument("--model", default="smollm2-135m", metavar="NAME", help="the target, for its tokenizer")
    prepare.add_argument("--tokenizer", metavar="NAME", help="folder or hub id of a tokenizer, instead")
    prepare.add_argument("--tokens", type=_positive, metavar="N", help="how many to take of a mixture")
    prepare.add_argument("--length", type=_positive, default=1024, metavar="N", help="of a row (default 1024)")
    prepare.add_argument("--held-out", type=float, default=0.02, metavar="SHARE", help="of documents (default 0.02)")
    prepare.add_argument("--seed", type=int, default=0, metavar="S", help="of the split (default 0)")
    prepare.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")


def _model_options(parser: argparse.ArgumentParser, drafter: bool = True) -> None:
    _target_options(parser)
    if drafter:
        named = (
            "auto: the best heads of the package, and ngram; ngram; a folder or model; HEADS+ngram; none (default auto)"
        )
        parser.add_argument("--drafter", default="auto", metavar="NAME", help=named)
    parser.add_argument(
        "--tree", metavar="SHAPE", help="chain:5, children per level like 4x2x1, both: 4x2x1+chain:5, FILE.json, auto"
    )


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help="folder, short name or hub id")
    executors = ("auto", "eager", "compiled", "cuda_graph", "cuda_graph_eager", "cuda_graph_compiled")
    how = "how steps are run (default %(default)s)"
    parser.add_argument("--executor", default="eager", choices=executors, help=how)
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (args.command != "train" or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no more overrides once it has seen an option
        args.overrides += rest
    args.started = started  # importing torch is part of what a person waits for
    # One line for an error means that the libraries' own warnings and bars stay out of the way.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        command = getattr(import_module(_COMMANDS[args.command], __package__), args.command)
        return command(args) or 0
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
