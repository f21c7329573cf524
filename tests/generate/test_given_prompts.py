"""Prompts that are more than token ids: read by the model's own forward, then decoded to transformers' own text."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines.module_state import structure
from paceline.spec.noise import stream_keys
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from support.families import IMAGE, SUPPORTED, WRAPPERS, build, pictured, wrapper
from support.models import noisy_copy, tiny_llama
from support.reference import plain_draw
from support.sentences import sentence
from support.tape import TapeExecutor, tape_executor

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = dict(do_sample=False, max_new_tokens=20)


@pytest.fixture(scope="module")
def wrapped():
    """[kind]: the model; made once."""
    return {kind: wrapper(kind) for kind in WRAPPERS}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_texts_behind_images_are_transformers_own(wrapped, kind, draft):
    model, inputs = wrapped[kind], pictured(kind, rows=2)
    scored = dict(GREEDY, max_new_tokens=14, return_dict_in_generate=True, output_scores=True, repetition_penalty=1.2)
    truth = model.generate(**inputs, **scored)
    blind = model.generate(**inputs | dict(pixel_values=inputs["pixel_values"].flip(0)), **GREEDY)
    assert not torch.equal(truth.sequences, blind), "the images matter"
    drafter = ModelDrafter(tiny_llama(vocab=64))
    for drafting in (None, "ngram", drafter):
        found = paceline.generate(model, **inputs, drafter=drafting, **scored)
        assert torch.equal(found.sequences, truth.sequences)
        torch.testing.assert_close(torch.stack(found.scores), torch.stack(truth.scores), rtol=1e-4, atol=1e-4)
    text = pictured(kind)["input_ids"][:, -5:]  # no image: as any other model, also right after one
    assert torch.equal(paceline.generate(model, text, drafter=drafter, **GREEDY), model.generate(text, **GREEDY))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_sampled_texts_behind_images_depend_on_the_seed_alone(wrapped, kind):
    model, inputs = wrapped[kind], pictured(kind, rows=2)
    options = dict(do_sample=True, top_k=20, temperature=0.8, max_new_tokens=12, seed=[4, 4])
    plain = paceline.generate(model, **inputs, **options)
    assert torch.equal(paceline.generate(model, **inputs, drafter="ngram", **options), plain)
    alone = {name: value[:1] if len(value) == 2 else value[:16] for name, value in inputs.items()}
    assert torch.equal(paceline.generate(model, **alone, **options | dict(seed=[4])), plain[:1])
    several = paceline.generate(model, **alone, num_return_sequences=2, **options)
    assert torch.equal(several[0], several[1]) and torch.equal(several[:1], plain[:1])


def test_a_patched_wrapper_answers_about_images(wrapped):
    model, inputs = wrapped["qwen2_5_vl"], pictured("qwen2_5_vl")
    truth, state = model.generate(**inputs, **GREEDY), structure(model)
    model.generate(**pictured("qwen2_5_vl", rows=2), **GREEDY)
    assert structure(model) == state, "kept steps serve prompts with other images"
    with paceline.patch(model, "ngram") as patched:
        assert torch.equal(model.generate(**inputs, **GREEDY), truth)
    assert patched.speculated == 1 and not patched.fell_back


def test_kept_steps_serve_prompts_with_and_without_images(wrapped, monkeypatch):
    model = wrapped["qwen2_5_vl"]
    with tape_executor(monkeypatch) as made:
        for seed in (0, 1, None):
            inputs = pictured("qwen2_5_vl", seed=seed or 0)
            inputs = inputs if seed is not None else dict(input_ids=inputs["input_ids"][:, -5:])
            found = paceline.generate(model, **inputs, drafter="ngram", executor="tape", **GREEDY)
            assert torch.equal(found, model.generate(**inputs, **GREEDY))
        assert len(made) == 1
    TapeExecutor.made.clear()


def test_a_prompt_that_ends_in_an_image_is_refused_where_positions_have_axes(wrapped):
    inputs = pictured("qwen2_5_vl")
    end = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    cut = {name: value[:, :end] if value.shape[1] > end and value.ndim == 2 and len(value) == 1 else value
           for name, value in inputs.items() if name != "image_grid_thw"}  # fmt: skip
    cut |= dict(image_grid_thw=inputs["image_grid_thw"], pixel_values=inputs["pixel_values"])
    sentence(lambda: paceline.generate(wrapped["qwen2_5_vl"], **cut, **GREEDY), "end of this prompt as part of an")
    cut = {name: value[:, :7] if name in ("input_ids", "attention_mask") else value
           for name, value in pictured("llava").items()}  # fmt: skip
    truth = wrapped["llava"].generate(**cut, **GREEDY)
    assert torch.equal(paceline.generate(wrapped["llava"], **cut, drafter="ngram", **GREEDY), truth)


def models():
    return {name: build(name, SUPPORTED[name] | dict(eos_token_id=None)) for name in ("llama", "gemma2", "gpt2")}


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")
def test_embeddings_are_a_prompt(target, draft, hydra, ragged):
    """Alone, with the ids they are of, with padding, and as soft prompts that are of no ids."""
    ids, mask = ragged
    embeds = target.get_input_embeddings()(ids)
    penalised = dict(repetition_penalty=1.4, eos_token_id=[17, 5], pad_token_id=0)
    for drafter, options in ((None, penalised), ("ngram", {}), (draft, penalised), (hydra, {})):
        given = dict(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **options)
        truth = target.generate(**given)
        assert torch.equal(paceline.generate(target, drafter=drafter, **given), truth) and truth.shape[1] <= 20
        truth = target.generate(input_ids=ids, **given)
        assert torch.equal(paceline.generate(target, ids, drafter=drafter, **given), truth)
    torch.manual_seed(5)
    soft = dict(inputs_embeds=torch.cat([torch.randn(3, 4, 32), embeds], dim=1))
    soft["attention_mask"] = torch.ones(3, 13, dtype=torch.long)
    for model in models().values():
        truth = model.generate(**soft, **GREEDY)
        assert torch.equal(paceline.generate(model, drafter="ngram", **soft, **GREEDY), truth)
    sentence(lambda: paceline.generate(target, inputs_embeds=embeds[0]), "inputs_embeds is (9, 32)")
    sentence(lambda: paceline.generate(target, ids[:, 1:], inputs_embeds=embeds), "must be of the same tokens")


def test_the_first_token_is_drawn_as_all_others(target):
    """By the noise of its position, with the processors, and it may end the text."""
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    options = dict(inputs_embeds=embeds, do_sample=True, top_k=0, temperature=1.5, seed=[3, 9])
    text = paceline.generate(target, max_new_tokens=6, **options)
    scores = target(inputs_embeds=embeds).logits[:, -1] / 1.5
    keys = stream_keys([3, 9], 2)
    drawn = [plain_draw(scores[row].log_softmax(-1), torch.tensor(keys[row]), 5) for row in range(2)]
    assert text[:, 0].tolist() == drawn
    ended = paceline.generate(target, max_new_tokens=6, eos_token_id=drawn[0], pad_token_id=0, **options)
    assert ended[0].tolist() == [drawn[0], *[0] * (ended.shape[1] - 1)]
    out = paceline.generate(target, max_new_tokens=6, drafter="ngram", return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, text) and out.trace.summary()["num_tokens"] == 12


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_cache_is_carried_on(name, ragged):
    """Over three turns, with the whole text or new tokens alone; at the end it holds what transformers leaves in it."""
    model = build(name, SUPPORTED[name] | dict(eos_token_id=None))
    ids, mask = ragged
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    texts = [ids, ids]
    for turn, drafter in enumerate(("ngram", ModelDrafter(noisy_copy(model)), None)):
        expected = model.generate(texts[0], attention_mask=mask, cache=theirs, **GREEDY)
        found = paceline.generate(model, texts[1], mask, drafter=drafter, past_key_values=ours, **GREEDY)
        assert torch.equal(found[:, -20:], expected[:, -20:]), turn
        for one, other in zip(theirs.layers, ours.layers):
            assert one.get_seq_length() == other.get_seq_length()
            torch.testing.assert_close(one.keys[0], other.keys[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.values[0], other.values[0], rtol=1e-4, atol=1e-4)
        more = torch.randint(3, 60, (3, 4), generator=torch.Generator().manual_seed(turn))
        texts = [
            torch.cat([expected, more], dim=1),
            torch.cat([expected[:, -1:], more], dim=1),
        ]
        mask = torch.nn.functional.pad(mask, (0, 24), value=1)
    assert ours.get_seq_length() == 9 + 20 + 24 + 24 - 1


def test_a_cache_is_carried_on_by_a_patched_model_and_left_alone_by_a_refusal(target):
    ids = torch.randint(3, 61, (1, 9))
    kept, expected = DynamicCache(), target.generate(ids, cache=(whole := DynamicCache()), **GREEDY)
    sentence(lambda: paceline.generate(target, ids, cache=kept, seed=[1, 2], **GREEDY), "2 entries")
    assert kept.get_seq_length() == 0
    with paceline.patch(target, "ngram") as patched:
        found = target.generate(ids, cache=kept, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(found.sequences, expected) and patched.speculated == 1
    assert found.cache is kept and kept.get_seq_length() == whole.get_seq_length() == 28
    sentence(lambda: paceline.generate(target, ids, cache=kept, **GREEDY), "9 tokens and the cache handed in", "28")


def test_positions_of_the_caller_are_followed(target):
    ids = torch.randint(3, 61, (2, 9))
    options = dict(position_ids=torch.tensor([[*range(5, 14)], [*range(9)]]), **GREEDY)
    assert torch.equal(paceline.generate(target, ids, drafter="ngram", **options), target.generate(ids, **options))


def test_inputs_that_every_later_forward_needs_are_refused():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None, bos_token_id=1)
    model, ids = GPT2LMHeadModel(GPT2Config(**sizes)).eval(), torch.randint(3, 61, (1, 9))
    kinds = dict(token_type_ids=torch.full_like(ids, 7), pad_token_id=0, **GREEDY)
    sentence(lambda: paceline.generate(model, ids, **kinds), "token_type_ids goes on into every later forward")
    sentence(lambda: paceline.generate(model, ids, pixel_values=ids, **GREEDY), "does not take 'pixel_values'")
    sentence(lambda: paceline.generate(model, ids, return_legacy=3, **GREEDY), "does not take 'return_legacy'")


def test_kept_prompts_are_passed_by(wrapped):
    """Two images behind one text are two prompts."""
    model, kept = wrapped["llava"], paceline.PromptCache()
    for seed in (0, 1):
        inputs = pictured("llava", seed=0) | dict(pixel_values=pictured("llava", seed=seed)["pixel_values"])
        found = paceline.generate(model, **inputs, reuse=kept, **GREEDY)
        assert torch.equal(found, model.generate(**inputs, **GREEDY))
    assert len(kept) == 0
