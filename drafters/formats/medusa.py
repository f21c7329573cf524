"""Published Medusa heads as our own: the first version, with or without LM heads of their own, in the layouts of its
authors (which TGI reads) and of vLLM. Counts come from the tensors. Knows nothing of drafting.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...spec.target.taps import linear_head
from ...spec.target.weights import head_weight, linear_shape
from ..head_settings import HeadSettings
from ..medusa import MedusaHeads
from .checkpoint import Checkpoint
from .detect import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDS = "token_map"  # of vLLM: the token of each row of the LM heads
# Blocks of the authors and of vLLM: the number of the head, and of the block in it.
_BLOCKS = re.compile(r"(\d+)\.(\d+)\.linear\.weight"), re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


def load_heads(checkpoint: Checkpoint, target: "PreTrainedModel") -> MedusaHeads:
    """The heads in the target's dtype, on its device. Raises ValueError, in one sentence, for what does not fit."""
    vocab_size, size = linear_shape(linear_head(target))
    beside = {
        name.removeprefix(prefix): name for name in checkpoint.files for prefix in HEADS if name.startswith(prefix)
    }
    names = beside or checkpoint.plain_names()
    loaded = checkpoint.tensors(names.values())
    tensors = {name: loaded[full] for name, full in names.items()}
    vocabulary, order = _vocabulary(checkpoint, tensors.pop(_IDS, None), vocab_size)
    known = vocab_size if vocabulary is None else len(vocabulary)

    engine = any(name.startswith("blocks.") for name in tensors)
    numbers = [tuple(map(int, match.groups())) for name in tensors if (match := _BLOCKS[engine].fullmatch(name))]
    count, depth = (1 + max(column, default=0) for column in zip(*numbers or [(0, 0)]))
    if engine and "lm_head.weight" in tensors:
        tensors.setdefault("lm_heads.0.weight", tensors.pop("lm_head.weight"))
    blocks = [f"blocks.{h}.layers.{b}" if engine else f"{h}.{b}.linear" for b in range(depth) for h in range(count)]
    lm_heads = [f"lm_heads.{h}.weight" if engine else f"{h}.{depth}.weight" for h in range(count)]
    present = [name for name in lm_heads if name in tensors]
    if engine and present == lm_heads[:1]:  # one for all heads
        lm_heads = lm_heads[:1]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size, size) for name in blocks}
    if any(name.endswith(".bias") for name in tensors):
        shapes |= {f"{name}.bias": (size,) for name in blocks}
    if present:
        shapes |= dict.fromkeys(lm_heads, (known, size))
    checkpoint.check(tensors, shapes)

    rows = [tensors[name] if order is None else tensors[name][order] for name in lm_heads] if present else []
    if len(rows) == 1 < count:
        rows = [] if _is_targets(rows[0], vocabulary, target) else rows * count
    heads = MedusaHeads(HeadSettings(heads=count, blocks=depth, own_heads=bool(rows)), target, vocabulary)
    zeros = torch.zeros(size)
    state = {
        "weight": torch.stack([tensors[f"{name}.weight"] for name in blocks]).unflatten(0, (depth, count)),
        "bias": torch.stack([tensors.get(f"{name}.bias", zeros) for name in blocks]).unflatten(0, (depth, count)),
    }
    heads.load_state_dict(state | ({"head_weight": torch.stack(rows)} if rows else {}), strict=False)
    return heads.to(target.dtype).requires_grad_(False).eval()


def _is_targets(rows: Tensor, vocabulary: Tensor | None, target: "PreTrainedModel") -> bool:
    """Whether an LM head is the target's."""
    return vocabulary is None and torch.equal(rows.to(target.device, target.dtype), head_weight(target))


def _vocabulary(checkpoint: Checkpoint, ids: Tensor | None, vocab_size: int) -> tuple[Tensor | None, Tensor | None]:
    """The known ids, ascending, and the order of their rows; None for all."""
    if ids is None:
        return None, None
    if ids.ndim != 1 or ids.is_floating_point() or not len(ids) or len(ids.unique()) != len(ids):
        raise checkpoint.refused(f"tensor {_IDS!r} is no list of tokens; fetch the drafter again")
    ids, order = ids.long().sort()
    if ids[0] < 0 or ids[-1] >= vocab_size:
        worst = int(ids[0] if ids[0] < 0 else ids[-1])
        raise checkpoint.refused(
            f"it drafts token {worst} and this target has {vocab_size}: it is made for another one"
        )
    return ids, order
