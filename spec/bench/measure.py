"""`paceline bench`: methods decode the same prompts in turns, and everything measured goes into a run file.

Prompt by prompt (or batch by batch) every method decodes, the order rotating, after a decoding of the same size that
is not measured. The turns of a conversation are carried on with plain decoding's answers, so every method sees the
same text. Figures and pages are computed from the file afterwards.
"""

import hashlib
import shlex
import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import provenance
from ..cli.commands import load_model
from ..console import Bar
from ..data.content import Unfit
from ..data.entries import Source
from ..data.forms import parse_columns
from ..data.sources import open_source
from ..engines.executors import choose
from ..engines.pool import modules_of
from ..engines.runs import keep
from ..noise import row_keys
from ..plan.step_times import slot_bytes
from ..plan.store import automatic_shape, read_shape
from ..prompts import BenchPrompt, check_ids, fitting, left_padded, pad_id, read_bench_prompts
from ..proposal import Drafter
from ..stream.streamer import streamer_of
from ..target.load import end_ids
from ..target.weights import stored_bytes
from ..tree import DynamicShape, TreeShape
from .analysis import analyse
from .divergence import margin, parting
from .methods import Decoder, Method, parse_methods
from .runfile import VERSION, Difference, Record, RunWriter, read_run
from .wording import conclusion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 3  # prompts whose tokens are kept as text, for the report's token trace


def bench(args: Namespace) -> None:
    """The command: measure, or go on measuring, into `args.output`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    source, columns = open_source(args.prompts, args.split), parse_columns(args.columns)
    prompts = [
        replace(prompt, turns=prompt.turns[: args.turns]) for prompt in read_bench_prompts(source, args.limit, columns)
    ]
    model, tokenizer = load_model(args)
    prompts = [prompt for prompt, _ in fitting(prompts, tokenizer, model, args.max_new_tokens)]
    executor = args.executor
    if executor == "auto":
        executor = choose("auto", model, len(prompts) * args.max_new_tokens, True, compiled_before=False)
    methods = [method.settled(model) for method in parse_methods(args.methods, executor, args.temperature)]
    if args.batch > 1 and any(method.kind in ("transformers-lookup", "transformers-assisted") for method in methods):
        raise ValueError(f"--batch {args.batch}: transformers speculates with one text at a time; use --batch 1")
    decoders = {method.name: _decoder(method, model, tokenizer) for method in methods}
    writer = RunWriter(args.output, _header(args, source, model, decoders))
    measuring = Bench(args, model, tokenizer, decoders, writer)
    try:
        measuring.run(prompts)
    except KeyboardInterrupt:
        print(f"\n{args.output} keeps {len(measuring.records)} texts; the same command goes on with the others",
              file=sys.stderr)  # fmt: skip
        raise
    finally:
        writer.close()
    following = f"paceline report {shlex.quote(args.output)} -o report.html"
    print(f"{conclusion(analyse([read_run(args.output)]))}\na page of it: {following}")


def _decoder(method: Method, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Decoder:
    drafter: Drafter | None = None
    shape: TreeShape | DynamicShape | None = None
    if method.drafter is not None:
        from ... import load_drafter

        drafter = load_drafter(method.drafter, model, method.draft_weights, tokenizer)
        if method.executor is None and drafter.traits.causal_lm is None:
            raise ValueError(f"method {method.name!r}: {method.drafter} is no draft model that transformers can run")
    if method.kind == "drafted":
        assert drafter is not None and method.executor is not None
        if method.tree == "auto":
            shape = automatic_shape(model, drafter, method.executor, method.rule, method.temperature)
        else:
            shape = read_shape(method.tree, drafter)
        if len(shape) == 1:
            drafter = None
    elif method.kind == "ar":
        shape = TreeShape.chain(0)
    pad = pad_id(tokenizer)
    return Decoder(method, model, drafter, shape, pad)


@dataclass(slots=True)
class Bench:
    """One run of the bench over a file that may hold part of it already."""

    args: Namespace
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    decoders: dict[str, Decoder]
    writer: RunWriter
    records: dict[tuple, Record] = field(default_factory=dict)
    warm: set[tuple] = field(default_factory=set)
    totals: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0, 0]))

    def run(self, prompts: list[BenchPrompt]) -> None:
        for record in self.writer.done:
            self._count([record])
        batches = [prompts[start : start + self.args.batch] for start in range(0, len(prompts), self.args.batch)]
        rounds = self.args.repeats * sum(len(prompt.turns) for prompt in prompts)
        left_out = 0
        with Bar(total=rounds, unit="turn", desc="bench") as bar:
            for number, batch in enumerate(batches):
                for turn in range(max(len(prompt.turns) for prompt in batch)):
                    asked = [(prompt, self._context(prompt, turn)) for prompt in batch if len(prompt.turns) > turn]
                    taken = [(prompt, context) for prompt, context in asked if context is not None]
                    left_out += len(asked) - len(taken)
                    rows, ids = [prompt for prompt, _ in taken], [context for _, context in taken]
                    for repeat in range(self.args.repeats):
                        if rows:
                            self._round(number, turn, repeat, rows, ids)
                        bar.update(len(asked))
                        bar.set_postfix_str(self._postfix())
        if left_out:
            print(f"left out {left_out} later turns that do not fit into the model's context", file=sys.stderr)

    def _context(self, prompt: BenchPrompt, turn: int) -> list[int] | None:
        """The conversation up to the user's `turn`, with plain decoding's answers; None where one was left out, and
        where it cannot be decoded."""
        plain = next(name for name, decoder in self.decoders.items() if decoder.method.kind == "ar")
        said = []
        for earlier in range(turn):
            answer = self.records.get((prompt.id, earlier, plain, 0))
            if answer is None:
                return None
            said.append(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        try:
            ids = prompt.ids(self.tokenizer, said)
            check_ids(ids, self.model, self.args.max_new_tokens)
        except Unfit:
            return None
        return ids

    def _round(self, number: int, turn: int, repeat: int, rows: list[BenchPrompt], ids: list[list[int]]) -> None:
        """Every method decodes one turn of a batch once; baselines first wait to be compared with."""
        made: dict[str, list[Record]] = {}
        names = list(self.decoders)
        start = (number + turn + repeat) % len(names)
        for name in names[start:] + names[:start]:
            if (rows[0].id, turn, name, repeat) not in self.records:
                made[name] = self._decode(number, turn, repeat, rows, ids, name)
        for name, records in made.items():
            baseline = self.decoders[name].method.baseline
            if baseline is not None and self.decoders[name].method.same_text():
                known = {record.key: record for record in made.get(baseline, [])} | self.records
                truths = [known[record.prompt, turn, baseline, repeat] for record in records]
                made[name] = [self._compared(*pair) for pair in zip(records, truths, ids)]
        for records in made.values():
            self.writer.append(records)
            self._count(records)

    def _decode(
        self, number: int, turn: int, repeat: int, rows: list[BenchPrompt], ids: list[list[int]], name: str
    ) -> list[Record]:
        decoder, new_tokens = self.decoders[name], self.args.max_new_tokens
        batch = left_padded(ids, decoder.pad, self.model.device)
        seeds = [self._seed(prompt.id, repeat) for prompt in rows]
        size = name, len(rows), decoder.capacity(max(map(len, ids)), new_tokens)
        if size not in self.warm:
            self.warm.add(size)
            keep(self.model, len(self.warm))  # so that no step is ever made, or read from the disk, while measuring
            decoder.decode(batch, seeds, new_tokens)
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        texts, trace, seconds = decoder.decode(batch, seeds, new_tokens)
        memory = torch.cuda.max_memory_allocated(self.model.device) if cuda else None
        records = []
        for row, (prompt, generated) in enumerate(zip(rows, texts[:, batch["input_ids"].shape[1] :].tolist())):
            tokens = self._until_end(generated)
            events = [] if trace is None else [event for event in trace.events if event.row == row]
            pieces = {}
            if number * self.args.batch + row < SHOWN:
                seen = {token for event in events for token in (*event.tokens, *event.committed) if token >= 0}
                pieces = {str(token): self.tokenizer.decode([token]) for token in sorted(seen)}
            records.append(
                Record(
                    prompt=prompt.id, category=prompt.category, turn=turn, method=name, repeat=repeat, batch=number,
                    rows=len(rows), seconds=seconds, prompt_tokens=len(ids[row]), tokens=tokens, identical=None,
                    events=events, pieces=pieces, memory=memory,
                )
            )  # fmt: skip
        return records

    def _seed(self, prompt: str, repeat: int) -> int:
        """A row's seed belongs to its prompt, so that text does not depend on batches."""
        digest = hashlib.blake2b(f"{self.args.seed},{repeat},{prompt}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = end_ids(self.model)
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _compared(self, record: Record, truth: Record, ids: list[int]) -> Record:
        record.identical = record.tokens == truth.tokens
        position = parting(truth.tokens, record.tokens)
        if position is not None:
            key = row_keys([self._seed(record.prompt, record.repeat)], 1, self.model.device)[0]
            heat = self.decoders[record.method].method.temperature
            record.difference = Difference(position, *margin(self.model, ids + truth.tokens[:position], heat, key))
        return record

    def _count(self, records: list[Record]) -> None:
        for record in records:
            self.records[record.key] = record
            total = self.totals[record.method]
            total[0] += record.seconds / record.rows
            total[1] += len(record.tokens)
            total[2] += len(record.events)

    def _postfix(self) -> str:
        """Speed-up and tokens per step of the drafted methods so far."""
        shown = []
        for name, decoder in self.decoders.items():
            seconds, tokens, steps = self.totals[name]
            plain_seconds, plain_tokens, _ = self.totals[decoder.method.baseline or name]
            if decoder.method.kind == "drafted" and tokens and plain_tokens:
                gain = plain_seconds / plain_tokens * tokens / seconds
                shown.append(f"{name.partition(':')[0]} {gain:.2f}x {tokens / steps:.2f} tok/step")
        return ", ".join(shown[:3])


def _header(args: Namespace, source: Source, model: "PreTrainedModel", decoders: dict[str, Decoder]) -> dict:
    setup = {
        "model": Path(args.model).name,
        "fingerprint": provenance.target_fingerprint(model)[:16],
        "prompts": source.name,
        "prompts_sha256": source.fingerprint()[:16],
        "limit": args.limit,
        "turns": args.turns,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "repeats": args.repeats,
    }
    setup |= {"weights": args.weights} if args.weights != "16" else {}
    setup |= {"columns": args.columns} if args.columns else {}
    if (streamer := streamer_of(model)) is not None:
        names = "kind", "layers", "resident_layers", "bytes_per_forward", "direct"
        setup |= {f"stream_{name}": getattr(streamer.about, name) for name in names}
    return {
        "kind": "paceline-bench",
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "setup": setup,
        "methods": [decoder.about() for decoder in decoders.values()],
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "command": provenance.command(),
        "commit": provenance.git_commit(),
        "memory": _memory(model, decoders),
    }


def _memory(model: "PreTrainedModel", decoders: dict[str, Decoder]) -> dict:
    """Bytes of the target, of one slot of a row in its cache, and of each drafter's own weights and slots."""
    target_addresses = {parameter.data_ptr() for parameter in model.parameters()}
    drafters = {}
    for name, decoder in decoders.items():
        sizes = {p.data_ptr(): p.nbytes for module in _modules(decoder) for p in module.parameters()}
        weights = sum(size for address, size in sizes.items() if address not in target_addresses)
        slot = 0 if decoder.drafter is None else slot_bytes(model, decoder.drafter)
        drafters[name] = {"weights": weights, "slot": slot}
    return {"target": stored_bytes(model), "slot": slot_bytes(model), "drafters": drafters}


def _modules(decoder: Decoder) -> list[torch.nn.Module]:
    return [] if decoder.drafter is None else modules_of(decoder.drafter)
