"""Prompt lookup drafts only what stands in the text."""

import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.proposal import DraftRequest, DraftSampling
from paceline.spec.request import Request
from paceline.spec.state import DecodeState
from paceline.spec.tree import TreeShape


def test_prompt_lookup_drafts_only_what_stands_in_the_text():
    """Every drafted edge of every shape follows the text: 5 6 7 or 5 8 9, never 5 8 7."""
    text = [5, 6, 7, 5, 8, 9, 5]
    edges = {(5, 6), (6, 7), (7, 5), (5, 8), (8, 9), (9, 5)}
    for parents in ([-1, 0, 0, 1, 2], [-1, 0, 0, 2, 1], [-1, 0, 1, 0, 3, 2, 4], [-1, 0, 0, 0, 1, 2, 3]):
        shape = TreeShape(tuple(parents))
        request = DraftRequest(1, 32, 61, torch.device("cpu"), shape, DraftSampling())
        session = NgramDrafter().open(request)
        state = DecodeState.empty(1, 32, 0, torch.device("cpu"))
        state.admit(torch.tensor([0]), [Request(text, 8, (1, 2))], [1])
        tokens = session.propose(state).tokens[0].tolist()
        drafted = {(tokens[shape.parents[n]], tokens[n]) for n in range(1, len(shape)) if tokens[n] >= 0}
        assert drafted and drafted <= edges
        assert {(5, 6), (5, 8)} <= drafted
