"""A causal LM over a slot cache: how targets and draft models are run.

`SlotModel` combines an unmodified Hugging Face model with a slot cache and forwards tokens with explicit slots,
positions and visibility. It holds the buffers of one decoding run. Node i of a tree is written at slot base + i, where
base is the slot of the root. Knows nothing of what the tokens are for.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from ..proposal import Proposal
from ..recurrent import hooks
from ..recurrent.passes import NodePass, TextPass
from ..recurrent.states import States
from ..state import index_of
from ..stream.streamer import streamer_of
from ..tree import Ancestry
from . import attention, masks, rope
from .cache import SlotCache
from .given import GivenPrompt
from .last_part import LastPart
from .masks import SlotView, showing
from .protocol import Seen, Span, TargetTraits, Unscored, unread
from .taps import NONE, Tap, feature_sizes, joined, listening, put_idle_head, put_taps


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the cache parameter of the forward of `model`: `cache` since transformers 5.24, `past_key_values`
    before it and in code that comes with a checkpoint.

    For a wrapper without either parameter the model inside is asked, then transformers' own generation code."""
    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    forwards = model.forward, type(model).forward, inner.forward, GenerationMixin.prepare_inputs_for_generation
    arguments = (inspect.signature(forward).parameters for forward in forwards)
    return next((name for taken in arguments for name in ("past_key_values", "cache") if name in taken), "cache")


class SlotModel:
    """A `Target`: `model` with a cache of `capacity` slots for each of `batch` rows, allocated once. `reads` (V,) are
    the model's own ids of the tokens that it is given, where it has another vocabulary. With `unscored` the logits of
    trees are computed where they are asked for, if the model lets one do that."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        capacity: int,
        taps: tuple[Tap, ...] = (),
        reads: Tensor | None = None,
        unscored: bool = False,
    ):
        masks.install()
        attention.install()
        config = model.config.get_text_config()
        self.model: PreTrainedModel | None = model
        self.reads = reads
        self.last_token = (config.vocab_size if reads is None else len(reads)) - 1  # ids beyond are of images
        self.cache_argument = cache_argument(model)
        self.capacity = capacity
        layers = config.num_hidden_layers
        states = States(batch, layers, capacity, model.device) if hooks.followed(model) else None
        self.cache = SlotCache(batch, capacity, layers, states)
        # Positions in a table are clamped: a drafted node may lie beyond the context, but is never committed there.
        table = None if rope.is_rotary(model) else getattr(config, "max_position_embeddings", None)
        self.last_position = None if table is None else table - 1
        self.follows_lengths = rope.install(model)
        self.slot_index = torch.arange(capacity, device=model.device)
        # (B,): of positions, see GivenPrompt; the length of the prompt, and what the longest of its batch has more
        self.shift, self.begun, self.beside = torch.zeros(3, batch, dtype=torch.int64, device=model.device)
        put_taps(model, taps)
        self.can_idle = put_idle_head(model)  # the head has nothing to do while a text is read
        self.last_part = LastPart(model) if unscored and self.can_idle else None
        sizes = batch, capacity, model.device, config.vocab_size
        static = streamer_of(model) is None and self.last_part is None
        self.traits = TargetTraits(*sizes, taps, sum(feature_sizes(model, taps)), static)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def packable(self) -> list[nn.Module]:
        assert self.model is not None, "a run at rest is woken first"
        return [self.model]

    def clear(self, rows: Tensor | None = None) -> None:
        self.cache.clear(rows)
        for numbers in (self.shift, self.begun, self.beside):
            numbers[index_of(rows)] = 0

    def take_over(self, prompt: GivenPrompt) -> None:
        self.cache.load_columns(prompt.layers(), prompt.pads, prompt.width)
        self.shift.copy_(prompt.shift)
        self.begun.copy_(prompt.width - prompt.pads)
        self.beside.copy_(prompt.pads - prompt.pads.min())

    def read(self, span: Span, features: Tensor | None = None) -> Tensor | None:
        return self._read(span, logits=False, features=features).features

    def read_scored(self, span: Span) -> Seen:
        """Like `read`, with the logits (R, n, V) of all positions besides the features."""
        return self._read(span, logits=True, every=True)

    def _read(self, span: Span, **how: Any) -> Seen:
        self.cache.running.rows = span.rows
        states, at = self.cache.states, None
        if states is not None:  # which may have absorbed tokens of it when they were drafted
            span = unread(span, states.held[span.index])
            at = states.text(span.rows, span.positions >= 0)
        self.begun[span.index], self.beside[span.index] = span.lengths, span.beside
        try:
            return self.forward_text(span.tokens, span.positions, span.reach, at=at, **how)
        finally:
            self.cache.running.rows = None

    def forward(self, proposal: Proposal, base: Tensor) -> Seen | Unscored:
        nodes = proposal.tokens, base, proposal.tree
        return self._unscored(*nodes) if self.last_part is not None else self.forward_nodes(*nodes)

    def _unscored(self, tokens: Tensor, base: Tensor, tree: Ancestry) -> Seen | Unscored:
        assert self.last_part is not None, "it is made for that"
        index, tokens = torch.arange(tree.size, device=base.device), tokens.clamp(0, self.last_token)
        # The first time the logits of the first and the last node are computed, too, and must come out the same.
        trial = self.last_part.agrees is None
        columns = slice(None, None, max(tree.size - 1, 1)) if trial else NONE
        logits, heard = self._run_nodes(tokens, base, tree, columns=columns)
        if trial and not self.last_part.check(heard, tokens, index[columns], logits):
            self.last_part = None
            return self.forward_nodes(tokens, base, tree)
        return Unscored(partial(self.last_part.logits, heard, tokens), self._features(heard))

    def commit(self, base: Tensor, path: Tensor, count: Tensor) -> None:
        self.cache.compact(base, path, count)

    def copy_rows(self, other: "SlotModel", rows: Tensor, into: Tensor | None = None) -> None:
        self.cache.copy_rows(other.cache, rows, into)
        for name in ("shift", "begun", "beside"):
            getattr(self, name)[index_of(into)] = getattr(other, name)[rows]

    @property
    def resumable(self) -> bool:
        return self.cache.states is None

    def save_row(self, row: int, count: int) -> list:
        return self.cache.save_row(row, count)

    def load_row(self, row: int, saved: list, count: int) -> None:
        self.cache.load_row(row, saved, count)

    def _run(
        self,
        tokens: Tensor,
        slots: Tensor,
        view: SlotView,
        at: TextPass | NodePass | None = None,
        features: Tensor | None = None,
        keep: int = 0,
        columns: slice | None = None,
    ) -> tuple[Tensor, dict[Tap | str, Any]]:
        """Forward `tokens` (B, n) written at `slots` (B, n), which are `at` to layers with states: the logits and what
        was heard. `keep` is `logits_to_keep`; the LM head computes no more than the `columns`."""
        assert self.model is not None, "a run at rest is woken first"
        self.cache.aim(slots, view.visible.shape[2])
        self.cache.at = at
        ids = tokens.clamp(0, self.last_token)
        hearing: AbstractContextManager[dict[Tap | str, Any]] = nullcontext({})
        if self.traits.taps or columns is not None:
            hearing = listening(columns)
        rows = index_of(self.cache.running.rows)
        positions = view.query_positions + self.shift[rows, None]
        if self.follows_lengths:
            lengths = torch.maximum(positions + 1, self.begun[rows, None]) + self.beside[rows, None]
            view = replace(view, lengths=lengths)
        with showing(view), hooks.passing(at), hearing as heard:
            out = self.model(
                input_ids=ids if self.reads is None else self.reads[ids],
                position_ids=positions.clamp(0, self.last_position),
                use_cache=True,
                logits_to_keep=keep,
                **{self.cache_argument: self.cache},
                **({} if features is None else {"features": features}),
            )
        return out.logits.float(), heard

    def _features(self, heard: dict[Tap | str, Any], keep: int = 0) -> Tensor | None:
        taps = self.traits.taps
        return joined(heard, taps)[:, -keep:] if taps else None

    def forward_text(
        self,
        tokens: Tensor,
        slots: Tensor,
        reach: int | None = None,
        logits: bool = True,
        features: Tensor | None = None,
        at: TextPass | None = None,
        every: bool = False,
    ) -> Seen:
        """Forward committed text (B, n): each token is written at the slot of its position and sees all slots up to its
        own. All slots are below `reach`. A model that reads `features` (B, n, F) with its tokens is given them.

        Negative slots mean padding, which is written to the last slot. Layers with states read the text as `at` says;
        without it they absorb what they do not hold yet, and other tokens are padding. Returns the logits of the last
        column, or of `every` one; with `logits=False` the features of all columns instead, where there are taps."""
        padding = slots < 0
        positions = slots.clamp(min=0)
        seen = self.slot_index[:reach]
        visible = seen <= positions[:, :, None]  # (B, n, reach)
        view = SlotView(positions, seen.expand(len(tokens), -1), visible)
        whole = every or (not logits and bool(self.traits.taps))
        keep, columns = 0 if whole else 1, NONE if self.can_idle and not logits else None
        states, first, again = self.cache.states, slots[:, 0], None
        if states is not None and at is None:
            again = states.last_text(first, slots.shape[1])
            padding = slots < states.held[:, None]
        where = torch.where(padding, self.capacity - 1, slots)
        scores, heard = self._run(tokens, where, view, at or again, features, keep, columns)
        if states is not None and again is not None:
            states.commit_text(first, slots.shape[1])
        return Seen(scores, self._features(heard, keep))

    def _run_nodes(
        self, tokens: Tensor, base: Tensor, tree: Ancestry, nodes: Tensor | None = None, **how: Any
    ) -> tuple[Tensor, dict[Tap | str, Any]]:
        """Forward nodes as `_run` does, which is told `how`."""
        index = torch.arange(tree.size, device=base.device) if nodes is None else nodes
        at = None if self.cache.states is None else self.cache.states.nodes(base, tree, nodes)
        return self._run(tokens, base[:, None] + index, self.view_of_nodes(base, tree, index), at, **how)

    def forward_nodes(
        self,
        tokens: Tensor,
        base: Tensor,
        tree: Ancestry,
        nodes: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Seen:
        """Forward tree nodes, all or a subset `nodes` (n,), after the committed text in the first `base` (B,) slots."""
        logits, heard = self._run_nodes(tokens, base, tree, nodes, features=features)
        return Seen(logits, self._features(heard))

    def view_of_nodes(self, base: Tensor, tree: Ancestry, index: Tensor) -> SlotView:
        """The view of the nodes `index` (n,): they see the committed text, their ancestors and themselves."""
        depths, ancestors = tree.depths, tree.ancestors
        inside = self.slot_index - base[:, None]  # (B, capacity): the node at each slot
        is_node = (inside >= 0) & (inside < tree.size)
        inside = inside.clamp(0, tree.size - 1)
        rows = ancestors[:, index].expand(len(base), -1, -1)  # (B, n, N)
        related = rows.gather(2, inside[:, None].expand(-1, len(index), -1))
        key_depths = depths.expand(len(base), -1).gather(1, inside)
        return SlotView(
            query_positions=base[:, None] + depths[:, index],
            key_positions=torch.where(is_node, base[:, None] + key_depths, self.slot_index),
            visible=torch.where(is_node[:, None], related, (self.slot_index < base[:, None])[:, None]),
        )
