"""A causal LM over slots: the one way in which targets and draft models are run.

`SlotModel` pairs an unmodified Hugging Face model with a slot cache and forwards tokens at explicit
slots, positions and visibility. It holds the buffers of one decoding run; it knows the tree's layout
(node i of a row sits at slot base + i, where base is the root's slot) but not what the tokens are for.
"""

import inspect

import torch
from torch import Tensor
from transformers import GenerationMixin

from . import (
    attention,  # noqa: F401  (answers to "sdpa" while a slot forward runs)
    native,
)
from .cache import SlotCache
from .hidden import last_heard, listen, listening
from .masks import SlotView, showing
from .tree import TokenTree


def cache_argument(model) -> str:
    """The name by which the forward of `model` takes its cache: `cache` since transformers 5.24, `past_key_values`
    before it and in code that came with a checkpoint.

    Of a wrapper, what is inside says so; where nothing does, it is the name that transformers itself uses."""
    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    forwards = model.forward, type(model).forward, inner.forward, GenerationMixin.prepare_inputs_for_generation
    arguments = (inspect.signature(forward).parameters for forward in forwards)
    return next((name for taken in arguments for name in ("past_key_values", "cache") if name in taken), "cache")


class SlotModel:
    """`model` with a cache of `capacity` slots a row, allocated once.

    With `keep_hidden`, `hidden` is the last hidden state of the tokens whose logits the last forward gave."""

    def __init__(self, model, capacity: int, keep_hidden: bool = False):
        config = model.config.get_text_config()
        self.model = model
        self.cache_argument = cache_argument(model)
        self.capacity = capacity
        self.cache = SlotCache(capacity, config.num_hidden_layers)
        # A drafted node may stand beyond the context, where it can never be committed.
        self.last_position = (getattr(config, "max_position_embeddings", None) or capacity) - 1
        self.slot_index = torch.arange(capacity, device=model.device)
        self.keep_hidden = keep_hidden
        self.hidden: Tensor | None = None  # (B, n, H)
        self.twice: Tensor | None = None  # (2,): node 0 and node 0, where it is not forwarded alone
        if keep_hidden:
            listen(model)
        if model.device.type == "cpu" and native.prepare() and model.dtype == torch.bfloat16:
            self.twice = torch.zeros(2, dtype=torch.long)

    def forward(
        self, tokens: Tensor, slots: Tensor, view: SlotView, keep: int | Tensor = 0
    ) -> Tensor:  # (B, n) -> (B, n, V)
        """Logits in float32 of `tokens` (B, n) written at `slots` (B, n); `keep` as `logits_to_keep`."""
        self.cache.aim(slots, view.visible.shape[2])
        with showing(view), listening() as heard:
            out = self.model(
                input_ids=tokens.clamp(min=0),
                position_ids=view.query_positions.clamp(0, self.last_position),
                use_cache=True,
                logits_to_keep=keep,
                **{self.cache_argument: self.cache},
            )
        if self.keep_hidden:
            self.hidden = last_heard(heard)
        return out.logits.float()

    def forward_text(self, tokens: Tensor, slots: Tensor, keep: int | Tensor = 0, reach: int | None = None) -> Tensor:
        """Committed text: each token stands at the slot of its position and sees all slots up to its own, none
        of which is at `reach` or beyond it.

        Slots below 0 mean padding and go to the last slot."""
        padding = slots < 0
        positions = slots.clamp(min=0)
        seen = self.slot_index[:reach]
        visible = seen <= positions[:, :, None]  # (B, n, reach)
        view = SlotView(positions, seen.expand(len(tokens), -1), visible)
        return self.forward(tokens, torch.where(padding, self.capacity - 1, slots), view, keep)

    def forward_nodes(self, tokens: Tensor, base: Tensor, tree: TokenTree, nodes: Tensor | None = None) -> Tensor:
        """Logits of tree nodes, all or a subset `nodes` (n,), behind the committed text of `base` (B,) slots.

        On a CPU, sums over a single row may be taken in another order than over each of several, and a bfloat16 result
        is now and then rounded otherwise. A tree that is one node of one row is therefore forwarded twice, up to the
        LM head, so that plain decoding rounds as drafted decoding does. It costs a few per cent of the step, most of
        which is reading weights."""
        index = torch.arange(tree.size, device=base.device) if nodes is None else nodes
        if nodes is not None or tokens.numel() > 1 or self.twice is None:
            return self.forward(tokens, base[:, None] + index, self.view_of_nodes(base, tree, index))
        index = self.twice  # data to a compiler, which would else make one row of the two
        view = self.view_of_nodes(base, tree, index)
        return self.forward(tokens.index_select(1, index), base[:, None] + index, view, keep=1)

    def view_of_nodes(self, base: Tensor, tree: TokenTree, index: Tensor) -> SlotView:
        """What the nodes `index` (n,) may see: the committed text, their ancestors and themselves."""
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

    def prefill(self, tokens: Tensor, lengths: Tensor, chunk: int, rows: Tensor | None = None) -> Tensor | None:
        """Write the texts `tokens` (B, T) of `lengths` (B,), all but the last token of each, `chunk` tokens
        at a time, so that memory does not grow with the prompt. Forgets what the cache held.

        With `rows` (R,) only those are read and written: the others' texts go on where they are. Returns the
        hidden state of the last token written of each row read, (R, H), where hidden states are kept: zeros for a
        text of one token, and None where all texts are."""
        if rows is not None:
            tokens, lengths = tokens[rows], lengths[rows]
        self.cache.clear(rows)
        self.cache.rows = rows
        width, hidden = int(lengths.max()) - 1, None
        for start in range(0, width, chunk):
            columns = self.slot_index[start : min(start + chunk, width)]
            slots = torch.where(columns < lengths[:, None] - 1, columns, -1)  # (B, n)
            last = lengths[:, None] - 2 - start  # (B, 1): its place in this chunk
            keep = last.clamp(0, len(columns) - 1) if self.keep_hidden else 1
            self.forward_text(tokens[:, columns], slots, keep, reach=start + len(columns))
            if self.keep_hidden:
                here = (last >= 0) & (last < len(columns))
                earlier = torch.zeros_like(self.hidden[:, 0]) if hidden is None else hidden
                hidden = torch.where(here, self.hidden[:, 0], earlier)
        self.cache.rows = None
        return hidden
