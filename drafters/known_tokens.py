"""Drafters that know only a part of the vocabulary, whose smaller LM head makes drafting cheaper.

The output stays the same: a token that is never drafted can still come from the target (FR-Spec, arXiv:2502.14856).
Lists of known ids are ascending. Knows nothing of networks or training.
"""

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..spec.kernels.block_linear import BlockLinear
from ..spec.kernels.panel_linear import PanelLinear
from ..spec.target.weights import Linear, dense_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "known_tokens.safetensors"  # in the folder of a draft model


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids` are ascending token ids of a vocabulary of `vocab_size`."""
    rising = ids.ndim == 1 and len(ids) > 0 and bool((ids[1:] > ids[:-1]).all())
    if ids.is_floating_point() or not rising or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(f"a head vocabulary must be ascending token ids from 0 to {vocab_size - 1}, each once")


def places(ids: Tensor, vocab_size: int) -> Tensor:  # (V',) -> (V,)
    """The index of each token in `ids`; V' for tokens that are not in it."""
    index_of_token = torch.full((vocab_size,), len(ids), device=ids.device)
    index_of_token[ids] = torch.arange(len(ids), device=ids.device)
    return index_of_token


def trimmed_head(head: Linear, ids: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A frozen copy of a linear LM head that gives the logits of the tokens `ids` (V',) only; in `dtype` where the
    head's weight is in blocks."""
    weight, bias = dense_rows(head, ids, dtype), getattr(head, "bias", None)
    return _linear(weight, None if bias is None else bias.detach()[ids])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def head_of_rows(head: Linear, rows: Tensor) -> Linear:
    """A linear LM head with the outputs `rows` (V',) of another: in blocks as that is, on its memory where they are
    its first ones."""
    if isinstance(head, BlockLinear):
        return head.of_rows(rows)
    if isinstance(head, PanelLinear):
        return trimmed_head(head, rows, head.dtype)
    first = torch.equal(rows, torch.arange(len(rows), device=rows.device))
    chosen = slice(len(rows)) if first else rows
    bias = getattr(head, "bias", None)
    return _linear(head.weight.detach()[chosen], None if bias is None else bias.detach()[chosen])


def with_head(model: "PreTrainedModel", head: nn.Module) -> "PreTrainedModel":
    """`model` with another LM head, on the same weights; `model` itself keeps its own."""
    copied = copy.copy(model)
    copied._modules = dict(copied._modules)
    copied.__dict__.pop("_paceline_drafter", None)
    copied.set_output_embeddings(head)
    return copied


class WidenedHead(nn.Module):
    """A trimmed head that gives logits of the whole vocabulary, -inf for unknown tokens."""

    ids: Tensor

    def __init__(self, head: nn.Linear, ids: Tensor, vocab_size: int):
        super().__init__()
        self.head, self.vocab_size = head, vocab_size
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., V)
        logits = self.head(hidden)
        return logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf).index_copy(-1, self.ids, logits)


def reading(model: "PreTrainedModel", reads: Tensor) -> "PreTrainedModel":
    """`model`, a copy of the caller's own, from now on for token ids of another vocabulary: `reads` (V,) are its own
    ids for them."""
    plain, model.config = model.forward, copy.deepcopy(model.config)
    model.config.get_text_config().vocab_size = len(reads)

    @functools.wraps(plain)
    def forward(input_ids: Tensor, **options: Any) -> Any:
        return plain(input_ids=reads[input_ids], **options)

    model.forward = forward
    return model


def write_known(folder: str | Path, ids: Tensor) -> None:
    save_file({"ids": ids.to("cpu", torch.int32)}, Path(folder) / FILE)


def read_known(folder: str | Path, known: int | None, vocab_size: int) -> Tensor | None:
    """The ids (V',) in the folder of a draft model whose config says that it knows `known` tokens; None for all.

    Raises ValueError for a missing or damaged list."""
    if known is None:
        return None
    file = Path(folder) / FILE
    try:
        ids = load_file(file)["ids"]
        check_vocabulary(ids, vocab_size)
        if len(ids) != known:
            raise ValueError(f"it lists {len(ids)} tokens and the config says {known}")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no list of known tokens ({error}); fetch the drafter again") from error
    return ids.long()
