"""The unroll of an EAGLE network over text: what decoding feeds it at each depth, for all positions at once.

A *column* t is a draft whose root's pair is pair t, that of the target's features at token t and of token t + 1. Step 0
is the root: all pairs of the text, each seeing those before it in its document. Step i is the node at depth i on the
text's own path: the feature that step i - 1 fed back and token t + 1 + i at position t + i, which sees the true pairs
up to t and, of the drafted ones, those of its own column alone (EAGLE-3's training-time test, arXiv:2503.01840).

Documents of any lengths lie one behind another in a single row; attention goes from document to document, so that
nothing is computed between them. Knows nothing of losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...spec.target.taps import HEAD, NONE, joined, listening, put_taps
from .objective import Batch, TargetView, labelled

_ATTENTION = "paceline_unroll"  # of `Columns`, in transformers' registry


@dataclass(frozen=True, eq=False)
class Text:
    """The N tokens of a batch's documents that have labels, one behind another."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,): in their documents
    lengths: list[int]  # of the documents
    features: Tensor  # (N, F): the target's, at the taps of the network
    hidden: Tensor  # (N, H): the target's, at its LM head
    judged: Tensor  # (N, depths) bool: which guesses have a label, as `labelled` says

    @classmethod
    def of(cls, batch: Batch, seen: TargetView, taps: tuple, depths: int) -> "Text":
        judged, documents = labelled(batch, depths), batch["document"]  # (B, T, depths), (B, T)
        real = documents >= 0
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        number = begins[real].cumsum(0) - 1  # (n,): of each real token's document
        useful = torch.zeros_like(number).index_add(0, number, judged[real][:, 0].long()) > 0  # (n,), of each document
        kept = torch.zeros_like(real).masked_scatter(real, useful[number])
        lengths = number[useful[number]].unique_consecutive(return_counts=True)[1]
        positions = torch.arange(int(kept.sum()), device=kept.device)  # (N,)
        positions -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        features = joined({tap: seen.tapped[tap][kept] for tap in taps}, taps)
        return cls(batch["input_ids"][kept], positions, lengths.tolist(), features, seen.hidden[kept], judged[kept])

    def columns(self) -> Tensor:  # (C,)
        """The columns that have labels."""
        return self.judged[:, 0].nonzero()[:, 0]


class Columns:
    """Keys, values and mask of an unroll: what the layers of a network take for their cache and for their mask."""

    def __init__(self, lengths: list[int], columns: Tensor):
        cuts = torch.tensor([0, *lengths], device=columns.device).cumsum(0)
        document = torch.bucketize(columns, cuts, right=True) - 1  # of each column
        self.counts = lengths, document.bincount(minlength=len(lengths)).tolist()
        parts = zip((columns - cuts[document]).split(self.counts[1]), lengths)
        self.hidden = [torch.arange(length, device=part.device) > part[:, None] for part, length in parts]  # (c, L)
        self.kept: dict[int, list[list[tuple[Tensor, Tensor]]]] = {}  # of each layer, step and document

    def update(self, keys: Tensor, values: Tensor, layer: int, **_) -> tuple[Tensor, Tensor]:
        """As of a cache of transformers; (1, Hkv, n, D) each."""
        steps = self.kept.setdefault(layer, [])
        counts = self.counts[len(steps) > 0]
        steps.append(list(zip(keys.split(counts, 2), values.split(counts, 2))))
        return keys, values

    def attend(self, query: Tensor, layer: int, scaling: float) -> Tensor:  # (1, H, n, D) -> (1, n, H, D)
        """Attention of the latest step, in each document."""
        steps = self.kept[layer]
        parts, attended = query.split(self.counts[len(steps) > 1], 2), []
        for part, hidden, *states in zip(parts, self.hidden, *steps):
            if len(steps) == 1:
                keys, values = (state.repeat_interleave(part.shape[1] // state.shape[1], 1) for state in states[0])
                attended.append(F.scaled_dot_product_attention(part, keys, values, is_causal=True, scale=scaling))
            else:
                attended.append(_drafting(part * scaling, states, hidden))
        return torch.cat(attended, 2).transpose(1, 2)


def _drafting(query: Tensor, steps: list[tuple[Tensor, Tensor]], hidden: Tensor) -> Tensor:  # (1, H, c, D)
    """Attention of the columns of a document to its true pairs, but for those that are `hidden` (c, L), and to their
    own drafted ones: of each step one key, so that no matrix of columns by columns is made."""
    (keys, values), *drafted = steps
    size, groups = hidden.shape, query.shape[1] // keys.shape[1]
    grouped = query.unflatten(1, (-1, groups))  # (1, Hkv, groups, c, D)
    scores = (grouped.flatten(2, 3) @ keys.mT).unflatten(2, (groups, -1))  # (1, Hkv, groups, c, L)
    scores = scores.masked_fill(hidden, -torch.inf)
    alone = [(grouped * key[:, :, None]).sum(-1, keepdim=True) for key, _ in drafted]
    shares = torch.cat([scores, *alone], -1).softmax(-1).to(values.dtype)
    attended = (shares[..., : size[1]].flatten(2, 3) @ values).unflatten(2, (groups, -1))
    for number, (_, value) in enumerate(drafted, size[1]):
        attended = attended + shares[..., number, None] * value[:, :, None]
    return attended.flatten(1, 2)


def _attention(module, query, key, value, attention_mask: Columns, scaling: float, **options) -> tuple[Tensor, None]:
    """transformers' attention signature. `key` and `value` are those of this step alone; the columns keep all."""
    return attention_mask.attend(query, module.layer_idx, scaling).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)


def unroll(network, text: Text, columns: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each step and column (C,), the LM head's input and the feature that is fed back, (C, H) each."""
    last = len(text.ids) - 1
    seen = Columns(text.lengths, columns)
    positions, tokens = text.positions, text.ids.roll(-1)  # the last pair of a document has a wrong token, and no label
    features = network.fused(text.features.to(next(network.layers.parameters()).dtype))
    put_taps(network, (HEAD, network.feedback))
    with _attending_by_document(network.config):
        for step in range(steps):
            with listening(columns=NONE) as heard:
                network(tokens[None], features[None], positions[None], attention_mask=seen, cache=seen)
            states, features = (heard[tap][0] for tap in (HEAD, network.feedback))
            if step == 0:
                states, features = states[columns], features[columns]
            yield states, features
            positions, tokens = text.positions[columns] + step + 1, text.ids[(columns + step + 2).clamp(max=last)]


@contextmanager
def _attending_by_document(config) -> Iterator[None]:
    before, config._attn_implementation = config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
