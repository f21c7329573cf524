"""The command `paceline train`: from a configuration to a trained drafter.

It builds the parts (target, objective, data, trainer), prints the plan, and lets the trainer run.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from .. import load_drafter
from ..drafters.kinds import KINDS
from ..spec.cli.outputs import refuse_overlap
from ..spec.cli.planning import first_turns
from ..spec.data.sources import open_source
from ..spec.files import check_writable, write_output
from ..spec.kernels.cpu import emulates_bfloat16, has_bfloat16
from ..spec.prompts import BenchPrompt, read_bench_prompts
from ..spec.provenance import target_fingerprint
from ..spec.target.load import load_target
from . import config as configuration
from .budget import make_plan
from .card import write_card, write_record
from .checkpoint import alone_in
from .config import Config, suggest
from .data.documents import tokenizer_fingerprint
from .data.rows import Rows, check_rows, check_tokenizer, fingerprint, open_data
from .decoding import Prompts, Settings, counted, decode
from .metrics import check_trackers
from .objectives.objective import Objective
from .objectives.target import OfflineTarget, OnlineTarget, hidden_bytes, hidden_folder, logit_head, write_hidden_states
from .trainer import Trainer
from .versions import versions

DECODED_TOKENS = 64  # per prompt of run.decode_prompts
_WAYS = "use DDP (the default) or FSDP2 (configs/fsdp2.yaml)"


def train(args) -> None:
    """Train as the configuration says; `--plan` stops after the plan, `--resume` goes on where a run stopped."""
    transformers.utils.logging.disable_progress_bar()
    stopped = run(configuration.load(args.config, args.overrides), args.plan, args.resume, args.config)
    if stopped is not None:
        print("stopped and saved; go on with --resume", file=sys.stderr)
        sys.exit(130 if stopped == signal.SIGINT else 143)


def run(config: Config, plan_only: bool = False, resume: bool = False, source: str | Path | None = None) -> int | None:
    """Train; returns the number of the signal that stopped it, if any. `source` is the file that the configuration was
    read from. Raises ValueError for a user's errors."""
    config = _with_precision(config)
    kind = objective_of(config.objective)
    check_trackers(config.run.trackers)
    folder = Path(config.run.folder)
    accelerator = _accelerator(config)
    if not resume and not plan_only and any(folder.glob("step-*")):
        raise ValueError(f"run.folder {folder} holds a run; go on with it by --resume, or choose another folder")
    if not plan_only:
        _check_outputs(config, None if resume else source)
    splits, about = open_data(config.data.folder)
    prompts = _decoded_prompts(config)
    target = config.target
    where = target.model, target.dtype, accelerator.device, target.trust_remote_code
    model, tokenizer = load_target(*where, weights=target.weights)
    check_tokenizer(about, tokenizer, config.data.folder)
    check_rows(splits, model, config.data.folder)
    encoded = first_turns(prompts, tokenizer, model, DECODED_TOKENS) if prompts else []
    set_seed(config.run.seed)
    objective = kind.build(config.objective, model, splits["train"].split)
    vocabulary = model.config.get_text_config().vocab_size
    need = _hidden_bytes(config, objective, model, splits)
    if need:
        accelerator.print(make_plan(config, objective, vocabulary, splits["train"], need).show())
        if plan_only:  # measuring the time would need the hidden states on disk
            return None
    seen = _target(config, objective, model, splits, accelerator) if objective.taps else None
    identity = {
        "target": target_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint(splits, about),
        "objective": config.objective,
        "order": {"seed": config.run.seed, "batch": config.optimisation.batch},
        "mixed_precision": config.optimisation.mixed_precision,
        "hidden_bits": config.target.hidden_bits,
    }
    decoding = _decoding(encoded, model) if encoded else None
    del model
    trainer = Trainer(config, accelerator, objective, seen, splits, identity, _documents(config), decoding)
    speed, _ = trainer.measure()
    plan = make_plan(config, trainer.objective, vocabulary, splits["train"], need, speed)
    accelerator.print(plan.show())
    if plan_only:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) if accelerator.is_main_process else nullcontext():
        if resume and not trainer.resume():
            accelerator.print(f"{folder} holds no checkpoint; starting from the beginning", file=sys.stderr)
        if accelerator.is_main_process:
            _write_documents(folder, config, source)
        stopped = trainer.train(plan.steps)
        if accelerator.is_main_process:
            _describe(folder, about, config)
    return stopped


def _check_outputs(config: Config, source: str | Path | None) -> None:
    """Raise ValueError where the files of a run cannot be written, or would overwrite what it reads."""
    written = [Path(config.run.folder) / name for name in ("config.yaml", "versions.json", "metrics.jsonl")]
    refuse_overlap([path for path in (source, config.run.decode_prompts) if path], written)
    for path in written:
        check_writable(path, make_folders=True)


def _describe(folder: Path, about: dict, config: Config) -> None:
    """Write record and card into the checkpoints `latest` and `best`."""
    for name in ("latest", "best"):
        if (folder / name).exists():
            write_record(folder / name, about, config)
            write_card(folder / name)


def _with_precision(config: Config) -> Config:
    """`config` with the mixed precision 'auto' resolved for this device."""
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    if config.optimisation.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "config: optimisation.mixed_precision is 'fp16' and accelerate trains in float32 instead on a CPU; choose "
            "bf16 or no"
        )
    if config.optimisation.mixed_precision != "auto":
        return config
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = device.type == "cpu" and has_bfloat16() and not emulates_bfloat16(device)
    return replace(config, optimisation=replace(config.optimisation, mixed_precision="bf16" if able else "no"))


def objective_of(settings: dict) -> type[Objective]:
    """The objective class for the kind named in the section `objective` of a configuration."""
    name, trained = settings.get("kind"), sorted(name for name, kind in KINDS.items() if kind.objective)
    if name not in trained:
        raise ValueError(f"config: objective.kind is {name!r}{suggest(str(name), trained)}")
    return KINDS[name].objective_class()


def _accelerator(config: Config) -> Accelerator:
    """The accelerator of this run. Raises ValueError for set-ups that train wrongly or cannot resume."""
    plugin = _sharding()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.optimisation.mixed_precision,
        log_with=config.run.trackers or None,
        project_dir=Path(config.run.folder),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # no buffer is ever changed
        fsdp_plugin=plugin,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _shard_on_cpus(accelerator, plugin)
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"accelerate is set up for {kind.value}; {_WAYS}")
    return accelerator


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """The FSDP2 plugin, where accelerate is set up for FSDP. Its mixed precision is off, because it would also cast the
    summed loss and the gradients; autocast does the casting, as without FSDP."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"accelerate is set up for FSDP {version}; {_WAYS}")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def _shard_on_cpus(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Turn FSDP on for CPU processes, where accelerate would silently train with DDP instead."""
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def _hidden_bytes(config: Config, objective, model, splits: dict[str, Rows]) -> int:
    if config.target.hidden == "online":
        return 0
    bits = config.target.hidden_bits
    return sum(hidden_bytes(model, objective.taps, len(rows), rows.length, bits) for rows in splits.values())


def _target(config: Config, objective, model, splits: dict[str, Rows], accelerator: Accelerator):
    """The target that gives the objective its hidden states; with states on disk, after writing the missing ones."""
    taps, bits = objective.taps, config.target.hidden_bits
    if config.target.hidden == "online":
        return OnlineTarget(model, taps)
    name = hidden_folder(target_fingerprint(model), model.dtype, taps, bits)
    folder = Path(config.target.hidden_folder or config.data.folder) / name
    ranks = accelerator.process_index, accelerator.num_processes
    for split, rows in splits.items():
        write_hidden_states(model, split, rows, folder, *ranks, taps=taps, bits=bits)
    accelerator.wait_for_everyone()
    return OfflineTarget(folder, logit_head(model), taps)


def _decoded_prompts(config: Config) -> list[BenchPrompt]:
    """Those of `run.decode_prompts`."""
    return read_bench_prompts(open_source(config.run.decode_prompts)) if config.run.decode_prompts else []


def _decoding(prompts: Prompts, model):
    """A function from a drafter folder to the tokens per step of decoding `prompts` with it."""

    def tokens_per_step(folder: Path) -> float:
        drafter = load_drafter(folder, model)
        decoded = decode(model, prompts, drafter, drafter.default_shape, Settings(DECODED_TOKENS))
        return counted(decoded)["tokens_per_step"]

    return tokens_per_step


def _write_documents(folder: Path, config: Config, source: str | Path | None) -> None:
    for name, text in _documents(config).items():
        if source is None or (folder / name).resolve() != Path(source).resolve():  # resumed by its own configuration
            write_output(folder / name, text)


def _documents(config: Config) -> dict[str, str]:
    """The files written into every checkpoint: the resolved configuration, and the versions of all packages."""
    return {"config.yaml": configuration.dump(config), "versions.json": json.dumps(versions(), indent=1) + "\n"}
