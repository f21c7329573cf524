"""Packed documents, and some hidden state for every position of them."""

import torch

from support.models import target_view


def packed():
    """Two rows of packed documents: prompts (mask 0), answers (mask 1), a second turn, padding."""
    torch.manual_seed(9)
    return {
        "input_ids": torch.randint(1, 61, (2, 14)),
        "document": torch.tensor([[0] * 8 + [1] * 6, [0] * 3 + [1] * 7 + [-1] * 4]),
        "loss_mask": torch.tensor(
            [[0, 0, 0, 1, 1, 1, 0, 1] + [1, 1, 0, 0, 1, 1], [0, 1, 1] + [0, 0, 1, 1, 1, 1, 1] + [1] * 4]
        ),
    }


def view_of(model, batch):
    """Some hidden state for every position; the objective does not ask where it comes from."""
    torch.manual_seed(10)
    return target_view(model, batch["input_ids"])
