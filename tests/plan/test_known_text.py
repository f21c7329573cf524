"""Drafting along a known text against forwarding the target at every position of it: the same drafts are accepted."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.spec.plan.known_text import ROWS, events_along, texts_of
from paceline.spec.plan.replay import WIDE, Replay, follow
from paceline.spec.tree import TreeShape
from paceline.spec.verify import draft_sampling

from support.models import eagle_copy, noisy_copy, tiny_llama


def drafters(model):
    yield "draft", ModelDrafter(noisy_copy(model, 0.05))
    yield "ngram", paceline.load_drafter("ngram", model)
    yield "eagle", EagleDrafter(eagle_copy(model, 0.05), "eagle")


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_drafts_along_a_known_text_are_those_of_following_it(temperature, one_thread):
    model = tiny_llama(seed=3, eos_token_id=7)
    torch.manual_seed(0)
    prompts = [{"input_ids": torch.randint(8, 61, (1, length))} for length in (3, 9, 1)]
    for name, drafter in drafters(model):
        texts = texts_of(model, drafter, prompts, temperature, 9)
        along = events_along(model, drafter, texts, WIDE, draft_sampling("match", temperature > 0), temperature)
        followed = [
            follow(model, drafter, prompt, "match", temperature, 9, seed) for seed, prompt in enumerate(prompts)
        ]
        accepted = 0
        for text, mine, slow in zip(texts, along, followed, strict=True):
            assert [event.tokens[0] for event in mine] == [event.tokens[0] for event in slow] != [], name
            assert len(mine) == len(text.new)
            for position, (event, reference) in enumerate(zip(mine, slow)):
                left = len(text.new) - position  # the target's draws go on behind the end of the text, unseen
                assert event.tokens == reference.tokens and event.parents == reference.parents, name
                assert event.accepted == reference.accepted[:left], name
                assert event.bonus == (reference.bonus if len(reference.accepted) < left else None), name
                accepted += len(event.accepted)
        assert accepted > 0, name
        for tree in (TreeShape.chain(3), TreeShape.parse("2x1x1"), WIDE):
            assert len(Replay(along).walk(tree)) == len(Replay(followed).walk(tree)), name


def test_more_texts_than_rows(one_thread):
    model = tiny_llama(seed=3)
    drafter = paceline.load_drafter("ngram", model)
    torch.manual_seed(0)
    prompts = [{"input_ids": torch.randint(8, 61, (1, 4 + number % 3))} for number in range(ROWS + 2)]
    texts = texts_of(model, drafter, prompts, 0.0, 5)
    assert [text.prompt for text in texts] == [prompt["input_ids"][0].tolist() for prompt in prompts]
    events = events_along(model, drafter, texts, TreeShape.chain(2), draft_sampling("match", False), 0.0)
    assert [[event.tokens[0] for event in text] for text in events] == [
        [text.prompt[-1], *text.new[:-1]] for text in texts
    ]
