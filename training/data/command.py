"""The commands `paceline data generate` and `paceline data prepare`: from options to function calls, and output."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...spec.console import one_line
from ...spec.data.forms import parse_columns
from .prompts import Prompt, Unusable, prompt_entries, read_beginnings, sift, turns_of


def data(args) -> None:
    """`paceline data STEP`."""
    {"generate": generate, "prepare": prepare}[args.step](args)


def generate(args) -> None:
    """`paceline data generate`."""
    from .answers import Sampling

    temperatures = _temperatures(args.temperatures)
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p} is not above 0 and at most 1")
    if (args.prompts is None) == (args.source is None):
        raise ValueError("give either a file or data set of prompts, or --source self")
    if args.beginnings and args.source is None:
        raise ValueError("--beginnings are of turns that the target invents; add --source self")
    if args.server and (args.source or args.compare_transformers):
        raise ValueError("--server answers prompts only; make them with --source self on a model that is here")
    sampling = Sampling(args.top_p, args.max_new_tokens, args.seed)
    if args.compare_transformers:
        _compare(args, sampling, temperatures)
        return
    if not args.output:
        raise ValueError("give the JSONL file to write with -o FILE")
    _generate(args, sampling, temperatures)


def _generate(args, sampling, temperatures: list[float]) -> None:
    from .answers import answer, check_template
    from .ledger import Ledger

    excluded = turns_of(args.exclude) if args.exclude else set()
    asked = [] if args.source else list(sift(_prompts(args), excluded))
    beginnings = read_beginnings(args.beginnings) if args.beginnings else None
    settings = {"model": str(args.model), "server": args.server, "top_p": args.top_p}
    settings |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "beginnings": beginnings}
    ledger = Ledger(args.output, settings, args.limit_tokens)
    try:
        if args.server:
            from .server import Server, answer_by

            server = Server(args.server, args.model, sampling)
            answer_by(server, ledger.open_jobs(asked, temperatures, args.repeats, args.seed), ledger, args.batch)
        else:
            model, tokenizer, decoding = _local(args)
            check_template(tokenizer)
            if args.source:
                asked = _invented(args, model, tokenizer, ledger, beginnings or [""], sampling, excluded, decoding)
            jobs = ledger.open_jobs(asked, temperatures, args.repeats, args.seed)
            answer(model, tokenizer, jobs, ledger, sampling, **decoding)
        _check_answered(ledger)
        ledger.begin()  # also where nothing was left to answer
    finally:
        ledger.close()
    print(ledger.summary())
    if ledger.failed:
        print(f"run the same command again to try the failed ones again; see {ledger.problems.path}", file=sys.stderr)


def _check_answered(ledger) -> None:
    """Raise ValueError where every prompt was skipped; of that nothing is written."""
    if ledger.done or ledger.failed:
        return
    reasons = Counter(problem["reason"] for problem in ledger.held)
    said = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common(2))
    raise ValueError(f"no prompt could be answered ({said or f'see {ledger.problems.path}'}); give others")


def _local(args):
    """The model, its tokenizer and how to decode."""
    from ...spec.cli.commands import load
    from ...spec.plan.store import read_shape

    model, tokenizer, drafter = load(args)
    tree = read_shape(args.tree, drafter) if drafter is not None else None
    return model, tokenizer, {"batch": args.batch, "drafter": drafter, "tree": tree, "executor": args.executor}


def _invented(
    args, model, tokenizer, ledger, beginnings: list[str], sampling, excluded: set[str], decoding: dict
) -> list[Prompt | Unusable]:
    from .answers import invent

    return list(sift(invent(model, tokenizer, ledger, beginnings, args.count, sampling, **decoding), excluded))


def _prompts(args) -> Iterator[Prompt | Unusable]:
    return prompt_entries(args.prompts, args.split, parse_columns(args.columns))


def _compare(args, sampling, temperatures: list[float]) -> None:
    from .throughput import compare_with_transformers

    if args.prompts is None:
        raise ValueError("--compare-transformers needs a file or data set of prompts")
    model, tokenizer, decoding = _local(args)
    prompts = [entry for entry in _prompts(args) if isinstance(entry, Prompt)][: args.count]
    compare_with_transformers(model, tokenizer, prompts, temperatures, sampling, **decoding)


def prepare(args) -> None:
    """`paceline data prepare`."""
    from datasets import disable_progress_bars

    from .prepare import LENGTH, Settings, prepare

    disable_progress_bars()
    name = args.tokenizer or args.model
    tokenizer, ends = load_tokenizer(name, args.trust_remote_code)
    vocabulary, context = (None, None) if args.tokenizer else limits(name, args.trust_remote_code)
    if args.length and context and args.length > context:
        raise ValueError(f"--length {args.length} is more than the target's context of {context}; give at most that")
    length = args.length or min(LENGTH, context or LENGTH)
    columns = parse_columns(args.columns)
    settings = Settings(length, args.held_out, args.seed, args.tokens, columns, args.split, vocabulary)
    made = prepare(args.sources, args.output, tokenizer, str(name), ends, settings)
    for split, count in made["counts"].items():
        share = count["tokens"] / max(1, count["rows"] * length)
        print(
            f"{split}: {count['documents']:,} documents, {count['tokens']:,} tokens, {count['loss_tokens']:,} of them "
            f"to learn from, {count['rows']:,} rows of {length} ({share:.1%} full)"
        )


def limits(name: str, trust_remote_code: bool = False) -> tuple[int | None, int | None]:
    """The vocabulary and the context of the model that `load_tokenizer` takes the tokenizer of; None where its config
    does not say."""
    from transformers import AutoConfig

    from ...spec.target.sources import resolve

    try:
        config = AutoConfig.from_pretrained(resolve(str(name)), trust_remote_code=trust_remote_code).get_text_config()
    except Exception:  # a tokenizer without a model, or a GGUF file
        return None, None
    return getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """A tokenizer by folder, short name or hub id, and the ids that end its model's turn."""
    from transformers import GenerationConfig

    from ...spec.target import tokenizers
    from ...spec.target.sources import resolve

    where = str(name) if Path(name).is_dir() else resolve(str(name))  # which asks folders for a model's config
    try:
        tokenizer = tokenizers.load_tokenizer(where, trust_remote_code)
    except Exception as error:  # whatever transformers and the hub raise for a bad source
        detail = one_line(error)
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded ({type(error).__name__}: {detail})") from error
    try:
        eos = None if Path(where).is_file() else GenerationConfig.from_pretrained(where).eos_token_id
    except OSError:
        eos = None  # a folder of a tokenizer alone
    ids = eos if isinstance(eos, list) else [eos]
    return tokenizer, frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _temperatures(text: str) -> list[float]:
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        temperatures = [-1.0]
    if not all(0 <= temperature < float("inf") for temperature in temperatures):
        raise ValueError(f"--temperatures {text!r} is no list of numbers of at least 0; write it like 0,0.7,1.0")
    return list(dict.fromkeys(temperatures))
