"""The command `paceline evaluate`: tokens per step with a drafter, estimated from text and measured by decoding.

First p[depth][rank] is counted: teacher-forced, on held-out rows or on the target's own greedy answers; for prompt
lookup and for sampling, where that is impossible, by drafting a wide tree at every position. A tree is planned from p
and the prompts are decoded with it. Estimate and measurement are written to one `acceptance.json`, with the counts
behind them and how they were made.
"""

import shlex
import sys
from pathlib import Path

import torch

from ..drafters.folder import read_folder
from ..drafters.shipped import shipped_folder
from ..spec.cli.commands import check_drawing, load
from ..spec.cli.outputs import refuse_overlap
from ..spec.cli.planning import first_turns, named_prompts
from ..spec.console import Bar, table
from ..spec.data.sources import open_source
from ..spec.engines.executors import choose
from ..spec.files import check_writable, write_json
from ..spec.plan.calibration import calibrate
from ..spec.plan.store import plan_path, read_shape
from ..spec.plan.trees import MODEST, Acceptance, Plan, best_tree
from ..spec.prompts import BenchPrompt
from ..spec.serve.texts import Text, decode_texts
from ..spec.tree import DynamicShape, TreeShape
from .acceptance import WIDTH, record
from .card import write_card
from .data.packing import pack
from .data.prompts import digest, normal, read_digests
from .data.rows import check_rows, check_tokenizer, open_data
from .decoding import Prompts, Settings, by_category, counted, decode
from .objectives.objective import Batch, count_ranks
from .ranks import accuracies, judge_of, spans, walk
from .records import shown
from .versions import versions

ROWS = 8  # batch size of teacher-forced counting
ANSWERED = 32  # batch size when the target answers the prompts
DEPTHS = 8  # depths counted for a draft model
SIZES = (4, 8, 16, 32, 64)  # numbers of nodes for which tokens per step are estimated by replay


def evaluate(args) -> None:
    """Evaluate a drafter and write `acceptance.json` into its folder, or to `-o`."""
    check_drawing(args)
    folder = _own_folder(args.drafter)
    if folder is None and not args.output:
        raise ValueError(f"{args.drafter} is no drafter folder here to keep its acceptance in; give a file with -o")
    kept = Path(args.output).resolve() if args.output else folder / "acceptance.json"
    if not args.output:
        _check_folder(kept, folder / "README.md", reads=args.prompts)
    asked = named_prompts(args, args.prompts)
    overlap = _overlap(folder, asked, args.prompts)
    model, tokenizer, drafter = load(args)
    if drafter is None:
        raise ValueError("none is no drafter; give a drafter's folder, its name, or ngram")
    if drafter.traits.parts:
        raise ValueError(f"{args.drafter} has no p of its own; evaluate its parts, and measure it with paceline bench")
    prompts = first_turns(asked, tokenizer, model, args.max_new_tokens)
    settings = Settings(args.max_new_tokens, args.temperature, args.verify, args.executor)
    acceptance, shape = _foretold(args, model, tokenizer, drafter, prompts, settings)
    decoded = decode(model, prompts, drafter, shape, settings)
    tree = {"nodes": len(shape), "depth": shape.max_depth, "parents": _static(shape) and list(shape.parents)}
    acceptance["measured"] = {**counted(decoded), **tree}
    acceptance["categories"] = by_category(prompts, decoded)
    acceptance["how"] |= {
        "command": command(args),
        "rule": args.verify,
        "temperature": args.temperature,
        "executor": args.executor,
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "prompts": {
            "file": Path(args.prompts).name,
            "sha256": open_source(args.prompts, args.split).fingerprint(),
            "in_training": overlap,
        },
        "versions": versions(),
    }
    write_json(kept, acceptance, sort_keys=True)
    if not args.output:
        write_card(folder)
    _show(acceptance)


def _own_folder(name: str) -> Path | None:
    """The local drafter folder called `name`; None where there is none."""
    path = Path(name) if Path(name).is_dir() else shipped_folder(name)
    return path if path is not None and read_folder(path) is not None else None


def _check_folder(*written: Path, reads: str) -> None:
    """Raise ValueError where a drafter's folder cannot take its acceptance and card."""
    refuse_overlap([reads], written)
    for path in written:
        try:
            check_writable(path)
        except ValueError as error:
            raise ValueError(f"{error} with -o") from error


def _overlap(folder: Path | None, prompts: list[BenchPrompt], name: str) -> int | None:
    """How many user turns of the prompts the drafter was trained on; None where that is not recorded."""
    trained = read_digests(folder) if folder is not None else None
    if trained is None:
        return None
    shared = sum(digest(turn) in trained for turn in {normal(turn) for prompt in prompts for turn in prompt.turns})
    if shared:
        said = f"{shared} user turns of {name} are in the drafter's training data; it will look too good"
        print(said, file=sys.stderr)
    return shared


def _foretold(
    args, model, tokenizer, drafter, prompts: Prompts, settings: Settings
) -> tuple[dict, TreeShape | DynamicShape]:
    """Count p: the contents of `acceptance.json` so far (p, counts, estimates), and the tree to decode with."""
    sampled = args.temperature > 0
    asked = read_shape(args.tree, drafter) if args.tree not in (None, "auto") else None
    deepest = max(DEPTHS, asked.max_depth if asked else 0)
    judge = None if sampled or args.verify != "match" else judge_of(drafter, model, deepest)
    if judge is None:
        if args.data:
            raise ValueError("--data judges heads and draft models on text, greedily; leave it out here")
        encoded = [prompt for _, prompt in prompts]
        replay = calibrate(model, drafter, encoded, args.verify, args.temperature, args.max_new_tokens)
        counts = Acceptance.of(replay.walk(TreeShape.chain(0)))
        shape = asked or _planned(args, model, drafter, counts.rates())
        acceptance = record(counts, _static(shape))
        if _static(shape):
            acceptance["estimated"]["replayed"] = _replayed(len(replay.walk(shape)), sum(map(len, replay.texts)))
        acceptance["how"] = {"counted": "a wide tree drafted at every position of the target's own text"}
        return acceptance, shape
    if args.data:
        batches, text = _held_out(args.data, model, tokenizer), f"held-out rows of {Path(args.data).name}"
    else:
        batches, text = _answers(model, prompts, args.max_new_tokens), "the target's own greedy answers to the prompts"
    answers: list[torch.Tensor] = []
    with Bar(batches, desc="judging", unit="batch") as bar:
        for batch in bar:
            answers += spans(*judge({name: values.to(model.device) for name, values in batch.items()}))
    if not answers:
        raise ValueError("there is no token of the target's own in the text to judge the drafter on; give more")
    depths = answers[0].shape[1]
    counts = count_ranks(answers, depths, WIDTH)
    shape = asked or _planned(args, model, drafter, counts.rates())
    acceptance = record(counts, _static(shape))
    right, judged = accuracies(answers, depths)
    acceptance["accuracy"] = [hits / max(tried, 1) for hits, tried in zip(right, judged)]
    acceptance["labels"] = judged
    if _static(shape):
        acceptance["estimated"]["replayed"] = _replayed(*walk(answers, shape))
    trees = [best_tree(counts.rates(), nodes, drafter.traits.deepest)[0] for nodes in SIZES]
    acceptance["by_size"] = [{"nodes": len(tree), **_replayed(*walk(answers, tree))} for tree in trees]
    return {**acceptance, "how": {"counted": f"teacher-forced on {text}"}}, shape


def _replayed(steps: int, tokens: int) -> dict:
    return {"tokens_per_step": tokens / steps, "steps": steps, "tokens": tokens}


def _static(shape) -> TreeShape | None:
    return shape if isinstance(shape, TreeShape) else None


def _planned(args, model, drafter, rates) -> TreeShape | DynamicShape:
    """The tree of the plan stored for this device, else a tree of moderate size planned from p."""
    executor = choose(args.executor, model, 0, capturable=True, compiled_before=False)
    kept = plan_path(model, drafter, executor, args.verify, args.temperature)
    if kept.is_file():
        return Plan.load(kept).shape
    if args.tree == "auto":
        raise ValueError(f"tree 'auto' has no plan for drafter {drafter.name!r} here; make one with paceline plan")
    return best_tree(rates, MODEST, drafter.traits.deepest)[0]


def _held_out(folder: str, model, tokenizer) -> list[Batch]:
    splits, about = open_data(folder)
    check_tokenizer(about, tokenizer, folder)
    check_rows(splits, model, folder)
    if "held_out" not in splits:
        raise ValueError(f"data folder {folder} has no held-out rows; prepare it with --held-out")
    rows = splits["held_out"]
    return [rows.batch(list(range(start, min(start + ROWS, len(rows))))) for start in range(0, len(rows), ROWS)]


def _answers(model, prompts: Prompts, new_tokens: int) -> list[Batch]:
    """The target's own greedy answers as batches of rows of similar length, one document per row."""
    texts: list[tuple[list[int], list[int]]] = []  # tokens, and which of them are the answer's
    with Bar(total=len(prompts), desc="answering", unit="prompt", leave=False) as bar:

        def finish(text: Text, new: list[int], failed: bool) -> None:
            if failed:
                raise ValueError("the target's scores are NaN; check its weights and dtype")
            texts.append(([*text.tokens, *new], [0] * len(text.tokens) + [1] * len(new)))
            bar.update()

        ids = [prompt["input_ids"][0].tolist() for _, prompt in prompts]
        asked = [Text(tokens, new_tokens, 0, len(tokens) + new_tokens) for tokens in ids]
        decode_texts(model, asked, finish, batch=ANSWERED)
    texts.sort(key=lambda text: (len(text[0]), text[0]))
    batches = []
    for start in range(0, len(texts), ROWS):
        part = texts[start : start + ROWS]
        rows = [pack([text], len(part[-1][0])) for text in part]
        batches.append({name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
    return batches


def command(args) -> str:
    """The command that repeats this evaluation, absolute paths replaced by their last part."""
    parts = ["paceline", "evaluate", shown(args.drafter), "--model", shown(args.model)]
    parts += ["--prompts", shown(args.prompts), "--max-new-tokens", str(args.max_new_tokens)]
    given = {"--data": args.data and shown(args.data), "--tree": args.tree and shown(args.tree)}
    given |= {"--temperature": args.temperature and f"{args.temperature:g}"}
    given |= {"--verify": args.verify != "match" and args.verify, "--dtype": args.dtype != "auto" and args.dtype}
    given |= {"--weights": args.weights != "16" and args.weights, "--columns": args.columns}
    given |= {"--split": args.split != "train" and args.split, "--stream": args.stream, "--resident": args.resident}
    given |= {"--executor": args.executor != "eager" and args.executor}
    return shlex.join([*parts, *(part for option, value in given.items() if value for part in (option, value))])


def _show(acceptance: dict) -> None:
    if "accuracy" in acceptance:
        print(f"accuracy by depth: {' '.join(f'{share:.3f}' for share in acceptance['accuracy'])}")
    for name, entry in acceptance["estimated"].items():
        print(f"estimated, {name}: {entry['tokens_per_step']:.2f} tokens per step")
    if "by_size" in acceptance:
        sizes = ", ".join(f"{entry['tokens_per_step']:.2f} with {entry['nodes']}" for entry in acceptance["by_size"])
        print(f"replayed by number of nodes: {sizes}")
    rows = []
    for category, entry in (*acceptance["categories"].items(), ("together", acceptance["measured"])):
        counts = [str(entry[name]) for name in ("prompts", "steps", "tokens")]
        rows.append([category or "-", *counts, f"{entry['tokens_per_step']:.2f}"])
    print(table(["category", "prompts", "steps", "tokens", "tokens per step"], rows))
