"""A causal LM over slots: the one way in which targets and draft models are run.

`SlotModel` pairs an unmodified Hugging Face model with a slot cache and forwards tokens at explicit
slots, positions and visibility. It holds the buffers of one decoding run; it knows the tree's layout
(node i of a row sits at slot base + i, where base is the root's slot) but not what the tokens are for.
"""

import torch
from torch import Tensor

from .cache import SlotCache
from .masks import SlotView, showing
from .tree import TokenTree


class SlotModel:
    """`model` with a cache of `capacity` slots a row, allocated once."""

    def __init__(self, model, capacity: int):
        config = model.config.get_text_config()
        self.model = model
        self.capacity = capacity
        self.cache = SlotCache(capacity, config.num_hidden_layers)
        # A drafted node may stand beyond the context, where it can never be committed.
        self.last_position = (getattr(config, "max_position_embeddings", None) or capacity) - 1
        self.slot_index = torch.arange(capacity, device=model.device)

    def forward(
        self, tokens: Tensor, slots: Tensor, view: SlotView, keep: int | Tensor = 0
    ) -> Tensor:  # (B, n) -> (B, n, V)
        """Logits in float32 of `tokens` (B, n) written at `slots` (B, n); `keep` as `logits_to_keep`."""
        self.cache.slots, self.cache.reach = slots, view.visible.shape[2]
        with showing(view):
            out = self.model(
                input_ids=tokens.clamp(min=0),
                position_ids=view.query_positions.clamp(0, self.last_position),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return out.logits.float()

    def forward_text(self, tokens: Tensor, slots: Tensor, keep: int = 0, reach: int | None = None) -> Tensor:
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
        """Tree nodes, all or a subset `nodes` (n,), behind the committed text of `base` (B,) slots.

        A node sees the committed text, its ancestors and itself."""
        depths, ancestors = tree.depths, tree.ancestors
        index = torch.arange(tree.size, device=base.device) if nodes is None else nodes
        inside = self.slot_index - base[:, None]  # (B, capacity): the node at each slot
        is_node = (inside >= 0) & (inside < tree.size)
        inside = inside.clamp(0, tree.size - 1)
        rows = ancestors[:, index].expand(len(tokens), -1, -1)  # (B, n, N)
        related = rows.gather(2, inside[:, None].expand(-1, len(index), -1))
        key_depths = depths.expand(len(tokens), -1).gather(1, inside)
        view = SlotView(
            query_positions=base[:, None] + depths[:, index],
            key_positions=torch.where(is_node, base[:, None] + key_depths, self.slot_index),
            visible=torch.where(is_node[:, None], related, (self.slot_index < base[:, None])[:, None]),
        )
        return self.forward(tokens, base[:, None] + index, view)

    def prefill(self, tokens: Tensor, lengths: Tensor, chunk: int) -> None:
        """Write the texts `tokens` (B, T) of `lengths` (B,), all but the last token of each, `chunk` tokens
        at a time, so that memory does not grow with the prompt. Forgets what the cache held."""
        self.cache.clear()
        width = int(lengths.max()) - 1
        for start in range(0, width, chunk):
            columns = self.slot_index[start : min(start + chunk, width)]
            slots = torch.where(columns < lengths[:, None] - 1, columns, -1)  # (B, n)
            self.forward_text(tokens[:, columns], slots, keep=1, reach=start + len(columns))
