"""Features: what a drafter is handed of the target's hidden states, for every token of prompt and text."""

import copy
import io
from dataclasses import replace

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.draft_session import ModelSession
from paceline.drafters.medusa import MedusaDrafter
from paceline.spec.target.selftest import attach
from paceline.spec.target.taps import HEAD, is_tap, layer_stacks

from support.families import SUPPORTED, build
from support.models import fitted_heads, noisy_copy, tiny_llama
from support.tape import tape_executor


class Reader(ModelDrafter):
    """A draft model that is handed the target's features and keeps those of every token."""

    def __init__(self, model, taps=(HEAD,)):
        super().__init__(model)
        self.traits = replace(self.traits, taps=taps)

    def open(self, request):
        sessions.append(ReadingSession(self.model, request))
        return sessions[-1]


class ReadingSession(ModelSession):
    def __init__(self, model, request):
        super().__init__(model, request)
        self.batch, self.capacity, self.features, self.seen = request.batch, request.capacity, None, []

    def read(self, span, features):
        super().read(span, features)
        self.allocate(features)
        index = range(self.batch) if span.rows is None else span.rows.tolist()
        for row, positions, own in zip(index, span.positions, features):
            self.features[row, positions[positions >= 0]] = own[positions >= 0]

    def allocate(self, features):
        if self.features is None:
            self.features = features.new_zeros(self.batch, self.capacity, features.shape[2])

    def propose(self, state):
        if self.features is not None:
            rows = zip(state.tokens.tolist(), state.lengths.tolist(), self.features.clone(), state.done.tolist())
            self.seen.append([(text[: n - 1], own[: n - 1]) for text, n, own, done in rows if not done])
        return super().propose(state)

    def follow(self, base, path, count, features):
        super().follow(base, path, count, features)
        self.allocate(features)
        for row, number in enumerate(count.tolist()):
            at = int(base[row])
            self.features[row, at : at + number] = features[row, path[row, :number]]


sessions: list[ReadingSession] = []


def cacheless(model, text, taps):
    """The features of `text` by hooks of this test's own."""
    heard = {}
    (stack,) = layer_stacks(model)
    handles = [
        layer.register_forward_hook(
            lambda module, args, out, number=number: heard.update({number: out[0] if isinstance(out, tuple) else out})
        )
        for number, layer in enumerate(model.get_submodule(stack))
    ]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(lambda m, a: heard.update({HEAD: a[0]})))
    model(input_ids=torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat([heard[tap][0] for tap in taps], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_drafter_is_handed_the_features_of_every_token(name):
    """Every step of three ragged rows, one of a single token, with prompts read in small chunks."""
    model = build(name, SUPPORTED[name])
    torch.manual_seed(3)
    ids = torch.randint(3, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :11] = 0
    sessions.clear()
    taps = (1, HEAD, 0)
    options = dict(tree="2x2", do_sample=False, max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    out = paceline.generate(
        model,
        ids * mask,
        mask,
        drafter=Reader(noisy_copy(model, 0.005), taps),
        prefill_chunk=5,
        return_dict_in_generate=True,
        **options,
    )
    assert out.trace.summary()["tokens_per_step"] > 1, "some drafts were accepted, so that paths were followed"
    steps = sessions[0].seen
    assert [len(text) for text, _ in steps[0]] == [11, 6, 0]
    for step in steps:
        for text, features in step:
            if text:
                truth = cacheless(model, text, taps)
                assert features.shape == truth.shape and (features - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_who_does_not_ask_gets_no_taps_but_that_of_the_idle_head(ragged):
    model = tiny_llama(seed=3)
    reader = Reader(noisy_copy(model), (0, HEAD))
    paceline.generate(model, *ragged, drafter="ngram", max_new_tokens=4)
    hooked = (model.lm_head._forward_pre_hooks, model.model.layers[0]._forward_hooks)
    assert list(map(is_tap, hooked[0].values())) == [True] and not hooked[1]
    for _ in range(2):
        paceline.generate(model, *ragged, drafter=reader, max_new_tokens=4)
    assert [list(map(is_tap, hooks.values())) for hooks in hooked] == [[True], [True]], "one each, however many runs"
    twin = copy.deepcopy(model)
    truth = paceline.generate(model, *ragged, max_new_tokens=4)
    assert torch.equal(paceline.generate(twin, *ragged, drafter=reader, max_new_tokens=4), truth)
    assert len(twin.lm_head._forward_pre_hooks) == 1
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize(("tap", "words"), [(2, "no layer 2"), (-1, "no layer -1")])
def test_layers_that_are_not_there_cannot_be_tapped(ragged, tap, words):
    model = tiny_llama()
    with pytest.raises(ValueError, match=words):
        paceline.generate(model, *ragged, drafter=Reader(noisy_copy(model), (tap,)), max_new_tokens=4)


@pytest.mark.parametrize("taps", [(), (0,), (HEAD,), (1, HEAD)])
def test_reading_computes_no_logits_of_the_prompt(ragged, taps):
    model, rows = tiny_llama(seed=3), []
    attach(model)
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    drafter = Reader(noisy_copy(model), taps) if taps else "ngram"
    paceline.generate(model, *ragged, drafter=drafter, tree="chain:2", prefill_chunk=4, max_new_tokens=4)
    assert rows[-1] == 3 and {count for count in rows if count != 3} == {0}, "three nodes a step, and nothing else"


def test_a_kept_step_hears_again_where_its_taps_were_taken_off(ragged, monkeypatch):
    model = tiny_llama(seed=3)
    drafter = MedusaDrafter(fitted_heads(model, "hydra", steps=5))
    with tape_executor(monkeypatch):
        texts = []
        for _ in range(2):
            texts.append(paceline.generate(model, *ragged, drafter=drafter, executor="tape", max_new_tokens=6))
            model.lm_head._forward_pre_hooks.clear()
    assert torch.equal(*texts)
