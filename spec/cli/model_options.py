"""Options that several commands share: of models, devices and numbers."""

import argparse

from .outputs import DrafterInput, Input
from .parser import Parser


def model_options(parser: Parser, drafter: bool = True, tree: str = "the drafter's own") -> None:
    """Which model, which drafter, and how they run."""
    group = parser.add_argument_group("model and drafter" if drafter else "model")
    group.add_argument(
        "--model",
        type=Input,
        default="smollm2-135m",
        metavar="NAME",
        help="folder, GGUF file, short name or hub id (default %(default)s)",
    )
    if drafter:
        named = (
            "auto: the best drafter of the package, and ngram; ngram; a folder or model; X+ngram; none "
            "(default %(default)s)"
        )
        group.add_argument("--drafter", type=DrafterInput, default="auto", metavar="NAME", help=named)
        coarse = "of the drafter: 16, q4 or q4-int8 (rounded to 4 bits), or auto, the quickest here (default 16)"
        group.add_argument("--draft-weights", default="16", metavar="FORM", help=coarse)
    if tree:
        shapes = (
            "of guesses: chain:5, children per level like 4x2x1, both: 4x2x1+chain:5, FILE.json, auto "
            f"(default: {tree})"
        )
        group.add_argument("--tree", type=Input, metavar="SHAPE", help=shapes)
    executors = ("auto", "eager", "compiled", "cuda_graph", "cuda_graph_eager", "cuda_graph_compiled")
    how = f"how steps are run: {', '.join(executors)} (default %(default)s)"
    group.add_argument("--executor", default="eager", choices=executors, metavar="HOW", help=how)
    device_options(group)
    stream_options(group)


def stream_options(group) -> None:
    """Of targets whose weights are fetched."""
    kinds = "fetch weights layer by layer, from disk, or beside a GPU from host memory: disk or host"
    group.add_argument("--stream", metavar="KIND", help=kinds)
    group.add_argument("--resident", metavar="SIZE", help="of weights that stay in memory all the same, such as 4GB")


def device_options(group) -> None:
    """Where a model is, and in which form."""
    dtypes = "float32, bfloat16, float16 or auto (default %(default)s)"
    group.add_argument("--dtype", default="auto", metavar="TYPE", help=dtypes)
    weights = "16, or the blocks of a quantised model: q4, q8, and faster by 8-bit activations q4-int8, q8-int8"
    group.add_argument("--weights", default="16", metavar="FORM", help=f"{weights} (default 16)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return seconds
