"""Logits processors of a user's."""

import torch
from transformers import LogitsProcessor


class Upwards(LogitsProcessor):
    """A user's processor that looks at the history: forbids tokens below the last one, mostly."""

    def __call__(self, input_ids, scores):
        floor = input_ids[:, -1:] % 20
        return scores.masked_fill(torch.arange(scores.shape[-1]) < floor, -torch.inf)
