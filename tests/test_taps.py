"""The hidden state that a drafter is handed: always the one whose logits drew the root."""

import copy
from dataclasses import replace

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter, StaticDraftSession

from conftest import noisy_copy, tiny_llama
from test_families import SUPPORTED, build


class Reader(ModelDrafter):
    """A draft model that looks at the target's hidden state and keeps what it sees."""

    def __init__(self, model):
        super().__init__(model)
        self.traits = replace(self.traits, reads_hidden=True)

    def open(self, request):
        sessions.append(ReadingSession(self.model, request))
        return sessions[-1]


class ReadingSession(StaticDraftSession):
    def __init__(self, model, request):
        super().__init__(model, request)
        self.seen = []

    def propose(self, state):
        if not state.done.all():
            rows = zip(state.tokens.tolist(), state.lengths.tolist(), state.hidden.clone(), state.done.tolist())
            self.seen.append([(text[:length], hidden) for text, length, hidden, done in rows if not done])
        return super().propose(state)


sessions: list[ReadingSession] = []


def cacheless_hidden(model, text):
    """The LM head's input at the last token of `text`."""
    heard = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: heard.append(inputs[0]))
    model(input_ids=torch.tensor([text]), use_cache=False)
    handle.remove()
    return heard[0][0, -1]


@torch.no_grad()
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_drafter_sees_the_state_that_drew_the_root(name):
    """Every step of three ragged rows, one of a single token, with a prefill in small chunks."""
    model = build(name, SUPPORTED[name])
    torch.manual_seed(3)
    ids = torch.randint(3, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :11] = 0
    sessions.clear()
    options = dict(tree="2x2", do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    out = paceline.generate(
        model,
        ids * mask,
        mask,
        drafter=Reader(noisy_copy(model, 0.005)),
        prefill_chunk=5,
        return_dict_in_generate=True,
        **options,
    )
    assert out.trace.summary()["tokens_per_step"] > 1, "some drafts were accepted, so that paths were followed"
    steps = sessions[0].seen
    assert len(steps[0]) == 3 and not steps[0][2][1].any(), "a prompt of one token: zeros"
    for step in steps:
        for text, hidden in step:
            if len(text) > 1:
                assert (hidden - cacheless_hidden(model, text[:-1])).abs().max() <= 1e-4 * hidden.abs().max()


def test_who_does_not_ask_pays_nothing(ragged):
    model = tiny_llama(seed=3)
    reader = Reader(noisy_copy(model))
    paceline.generate(model, *ragged, drafter="ngram", max_new_tokens=4)
    assert not model.lm_head._forward_pre_hooks
    paceline.generate(model, *ragged, drafter=reader, max_new_tokens=4)
    paceline.generate(model, *ragged, drafter=reader, max_new_tokens=4)
    assert len(model.lm_head._forward_pre_hooks) == 1, "one hook, however many runs"
    twin = copy.deepcopy(model)
    truth = paceline.generate(model, *ragged, max_new_tokens=4)
    assert torch.equal(paceline.generate(twin, *ragged, drafter=reader, max_new_tokens=4), truth)
