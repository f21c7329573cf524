"""How the tiny models of the tests are quantised, and on what."""

import torch
from paceline.spec.quantise.model import Recipe

RECIPE = Recipe(bits=4, group=32)


def some_texts(vocab=61, count=6, length=40):
    torch.manual_seed(5)
    return torch.randint(1, vocab, (count, length)).tolist()
