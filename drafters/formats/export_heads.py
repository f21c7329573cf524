"""Medusa heads in the layout of Medusa v1, which TGI reads: `{head}.{block}.linear.weight` and `.bias`, and
`{head}.{blocks}.weight` for heads with LM heads of their own."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...spec.quantise.folder import smallest_dtype
from ..medusa import MedusaHeads
from .export_check import check_heads
from .export_order import Export, Order

WEIGHTS = "medusa_lm_head.safetensors"
DROPPED = "vLLM has dropped Medusa heads after 0.32 and SGLang has none"


def heads_export(order: Order, heads: MedusaHeads) -> Export:
    """Raises ValueError for heads that the engine cannot run."""
    settings = heads.settings
    if order.engine.name != "tgi":
        raise ValueError(
            f"{order.name} are heads, which {order.engine.title} does not run ({DROPPED}); export independent heads "
            "--to tgi, or train an EAGLE head or a draft model"
        )
    if settings.mode != "independent":
        raise ValueError(
            f"{order.name} are heads of mode {settings.mode}, which no engine runs, as each guess reads the tokens "
            "before it; train with objective.mode: independent, or an EAGLE head"
        )
    if not settings.own_heads and settings.blocks > 1:
        raise ValueError(
            f"{order.name} has blocks={settings.blocks} before the target's LM head, and TGI runs one; train with "
            "objective.blocks: 1 or objective.own_heads: true"
        )
    if settings.own_heads and heads.trimmed:
        raise ValueError(
            f"{order.name} has LM heads of {len(heads.vocabulary)} known tokens, and TGI wants all "
            f"{heads.vocab_size}; train without objective.known_tokens or without objective.own_heads"
        )
    if settings.own_heads and heads.head_bias.any():
        raise ValueError(f"{order.name} has LM heads with a bias, and TGI's have none; decode it with Paceline")

    def write(folder: Path, tokens: int) -> None:
        dtype = smallest_dtype(heads)
        stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors(heads).items()}
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        about = config(heads, order.target_name)
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    notes = [f"{DROPPED}; TGI, in maintenance, reads this folder."]
    if heads.trimmed:
        notes.append(
            f"The heads know {len(heads.vocabulary)} tokens and TGI gives them the target's whole LM head, so they "
            "draft tokens that they have not learned to avoid, which costs acceptance."
        )
    read = sum(parameter.numel() for parameter in heads.parameters())
    if not settings.own_heads:
        read += settings.heads * heads.vocab_size * heads.hidden_size
    each = read // settings.heads  # a step of fewer tokens runs fewer heads

    def check(folder: Path) -> None:
        check_heads(folder, heads, order.target)

    return Export("medusa", write, check, each, tuple(notes), settings.heads)


def tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    named = {}
    for head in range(heads.settings.heads):
        for block in range(heads.settings.blocks):
            named[f"{head}.{block}.linear.weight"] = heads.weight[block, head]
            named[f"{head}.{block}.linear.bias"] = heads.bias[block, head]
        if heads.settings.own_heads:
            named[f"{head}.{heads.settings.blocks}.weight"] = heads.head_weight[head]
    return named


def config(heads: MedusaHeads, target_name: str) -> dict:
    """Without `architectures`, by which TGI would take it for a model; version 2 has the target's LM head."""
    settings = heads.settings
    about = {"medusa_num_heads": settings.heads, "medusa_num_layers": settings.blocks}
    version = {} if settings.own_heads else {"version": "2"}
    return {**about, "base_model_name_or_path": target_name, **version}
