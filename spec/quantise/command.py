"""The command `paceline quantise`: a target's folder in 4 or 8 bits, with a table of what that costs."""

import json
import sys
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from .. import provenance
from ..cli.commands import load_model
from ..console import Bar, table, waiting
from ..data.forms import EXAMPLE, parse_columns
from ..data.reading import Reading
from ..data.sources import open_source
from ..files import check_absent, new_folder
from ..target.adapters import active_adapters
from .calibration import Texts, read_records, read_texts
from .folder import is_quantised, write_model
from .model import Recipe, check_model, quantise_model
from .quality import Quality, compare, logits_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADER = ["weights", "KL (nats)", "same greedy token", "same drawn token", "perplexity"]


def quantise(args: Namespace) -> None:
    """`paceline quantise`."""
    if args.calibrate is None:
        raise ValueError(
            "the weights are rounded for texts that the model is to write: give --calibrate FILE, a JSONL file of some "
            f"six dozen prompts, each a line such as {EXAMPLE}, or of conversations or texts"
        )
    if is_quantised(args.model):
        raise ValueError(f"{args.model} is quantised already; give the model that it was made of")
    check_absent(args.output)
    source = open_source(args.calibrate, args.split)
    records = read_records(Reading(source, parse_columns(args.columns)), args.texts)
    recipe = Recipe(args.bits, args.group, args.head_bits, seed=args.seed)
    model, tokenizer = load_model(args)
    if active_adapters(model):
        raise ValueError(
            f"{args.model} is an adapter, whose layers are no plain linear ones; merge it into its base model by "
            "PEFT's merge_and_unload, save that, and quantise its folder"
        )
    check_model(model, recipe)
    with waiting(f"answering the prompts of {source.name}"):
        texts = read_texts(model, tokenizer, records, source.name)
    rows = {}
    with waiting(f"measuring {args.model} on {len(texts.held_out)} texts that are held out"):
        original = logits_on(model, texts.held_out)
        rows["16 bits"] = compare(original, original, texts.held_out)
    with waiting("rounding to the nearest codes, for comparison"):
        nearest = Recipe(args.bits, args.group, args.head_bits, "nearest")
        quantise_model(model, nearest, [])
        rows["to the nearest codes"] = compare(original, logits_on(model, texts.held_out), texts.held_out)
    del model
    model, _ = load_model(args)
    seconds = _calibrated(model, recipe, texts)
    with waiting("measuring what came out"):
        rows["calibrated"] = compare(original, logits_on(model, texts.held_out), texts.held_out)
    with new_folder(args.output) as work:
        _write(args, model, tokenizer, work, texts, rows, seconds)
    print(_shown(rows))
    print(f"\n{args.output} is a target like any other: paceline generate --model {args.output} --chat ...")


def _calibrated(model: "PreTrainedModel", recipe: Recipe, texts: Texts) -> float:
    """Quantise `model` in place with a progress bar; returns the seconds."""
    begun, tokens = time.perf_counter(), sum(map(len, texts.calibration))
    print(f"calibrating on {len(texts.calibration)} texts of {tokens} tokens, layer by layer", file=sys.stderr)
    with Bar(desc="quantising", unit="layer") as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        quantise_model(model, recipe, texts.calibration, progress)
    seconds = time.perf_counter() - begun
    print(f"quantised in {seconds:.0f} s", file=sys.stderr)
    return seconds


def _write(
    args: Namespace,
    model: "PreTrainedModel",
    tokenizer: object,
    folder: Path,
    texts: Texts,
    rows: dict[str, Quality],
    seconds: float,
) -> None:
    about = {"base": str(args.model), "bits": args.bits, "group": args.group, "head_bits": args.head_bits}
    write_model(model, tokenizer, folder, about)
    made = {
        **about,
        "quality": {name: row.record() for name, row in rows.items()},
        "calibration_texts": len(texts.calibration),
        "calibration_tokens": sum(map(len, texts.calibration)),
        "seconds": round(seconds, 1),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": date.today().isoformat(),
        "command": provenance.command(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
    }
    (folder / "quality.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(args, made, rows), encoding="utf-8")


def _cells(rows: dict[str, Quality]) -> list[list[str]]:
    figures = [(f"{q.kl:.3f}", f"{q.greedy:.3f}", f"{q.coupled:.3f}", f"{q.perplexity:.2f}") for q in rows.values()]
    return [[name, *row] for name, row in zip(rows, figures)]


def _shown(rows: dict[str, Quality]) -> str:
    positions = rows["calibrated"].positions
    return f"{table(HEADER, _cells(rows))}\n\n{_explained(positions)}"


def _explained(positions: int) -> str:
    return (
        f"Against the model in 16 bits, at {positions} positions of texts that were held out: the divergence of the "
        "next token's probabilities, how often the most probable token is the same, how often the token drawn at "
        "temperature 1 with the same noise is, and the perplexity of the texts."
    )


def _readme(args: Namespace, made: dict, rows: dict[str, Quality]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *_cells(rows)]]
    machine = made["machine"]["gpu"] or made["machine"]["cpu"]
    return f"""# {args.model} in {args.bits} bits

Made on {made["date"]} by

    {made["command"]}

on {machine}, in {made["dtype"]}. {made["calibration_tokens"]} tokens of {made["calibration_texts"]} texts were \
calibrated on, in {made["seconds"]:.0f} s.

{chr(10).join(lines)}

{_explained(rows["calibrated"].positions)} {
        "To the nearest codes: each weight by itself, with the same bits and group, without rotation or texts."
    }

`paceline.load_target(FOLDER)` loads it. Each group of {args.group} weights of a linear layer has codes of {args.bits} \
bits and a scale of 16; the inputs of the decoder layers are rotated. The LM head has codes of {args.head_bits} bits, \
embeddings and norms are as they were.
"""
