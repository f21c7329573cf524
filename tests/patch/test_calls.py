"""Whatever calls a patched `model.generate` gets the same text by speculation."""

import copy

import paceline
import pytest
import torch
from paceline.spec.target.slots import cache_argument
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, pipeline

GREEDY = dict(max_new_tokens=16, do_sample=False)
PROMPT = "ABCDEABCDEABC"


class Until(StoppingCriteria):
    def __init__(self, width):
        self.width = width

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.width)


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], 0

    def __len__(self):
        return len(self.puts)  # falsy at first, as a queue is

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def same(model, call, draft="ngram", calls=1, **settings):
    """Whether `call()` gives the same while the model is patched, by Paceline alone."""
    expected = call()
    with paceline.patch(model, draft, **settings) as patched:
        found = call()
    assert patched.speculated == calls and not patched.fell_back
    return expected, found


CALLS = {
    "positional": lambda m, ids: m.generate(ids, **GREEDY),
    "inputs": lambda m, ids: m.generate(inputs=ids, **GREEDY),
    "keywords": lambda m, ids: m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **GREEDY),
    "configuration": lambda m, ids: m.generate(ids, GenerationConfig(**GREEDY, repetition_penalty=1.3)),
    "configuration by name": lambda m, ids: m.generate(ids, generation_config=GenerationConfig(**GREEDY)),
    "all positional": lambda m, ids: m.generate(
        ids, GenerationConfig(**GREEDY), None, StoppingCriteriaList([Until(14)]), lambda row, text: [*range(30)], False
    ),
    "empty": lambda m, ids: m.generate(
        ids, assistant_model=None, streamer=None, inputs_embeds=None, token_type_ids=None, negative_prompt_ids=None,
        synced_gpus=None, custom_generate=None, num_beams=1, **{cache_argument(m): None}, **GREEDY,
    ),
    "of trainers": lambda m, ids: m.generate(
        ids, generation_config=GenerationConfig(**GREEDY), disable_compile=True, synced_gpus=False
    ),
    "static cache": lambda m, ids: m.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_direct_calls(model, ids, call):
    expected, found = same(model, lambda: call(model, ids))
    assert torch.equal(expected, found)


def test_padded_batches_and_a_draft_model(target, draft, ragged):
    prompt, mask = ragged
    call = lambda: target.generate(prompt, attention_mask=mask, eos_token_id=17, pad_token_id=0, **GREEDY)  # noqa: E731
    expected, found = same(target, call, draft, tree="2x1x1")
    assert torch.equal(expected, found)


def test_outputs_are_those_of_transformers(model, ids):
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY)
    expected, found = same(model, lambda: model.generate(ids, **options))
    assert type(found) is type(expected) and torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert len(found.logits) == len(expected.logits)


PIPED = {
    "one": PROMPT,
    "several": [PROMPT, "QQRQQRQ", "abc"],
    "chat": [{"role": "user", "content": PROMPT}],
    "chats": [[{"role": "user", "content": PROMPT}], [{"role": "user", "content": "XYZXY"}]],
}


@pytest.mark.parametrize("text", PIPED.values(), ids=PIPED)
def test_pipelines(model, tokenizer, text):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    batched = len(text) if isinstance(text, list) and isinstance(text[0], (str, list)) else 1
    expected, found = same(model, lambda: pipe(text, **GREEDY), calls=-(-batched // 2))
    assert expected == found


def test_pipelines_that_sample(model, tokenizer):
    ask = dict(num_return_sequences=3, do_sample=True, max_new_tokens=12)
    with paceline.patch(model, "ngram", seed=5) as patched:
        texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPT, **ask)
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        direct = paceline.generate(model, ids, seed=5, temperature=0.7, pad_token_id=0, **ask)
    assert len({text["generated_text"] for text in texts}) == 3 and patched.speculated == 1
    written = [tokenizer.decode(row[ids.shape[1] :]) for row in direct]
    assert [text["generated_text"] for text in texts] == [PROMPT + text for text in written]


@pytest.mark.filterwarnings("default")  # what lm-eval uses is its own affair
def test_lm_eval(model, tokenizer):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    evaluated = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=128, device="cpu")
    options = {"until": ["Z", "ab"], "max_gen_toks": 24, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate((PROMPT, "QQRQ", "abcab"))]
    expected, found = same(model, lambda: evaluated.generate_until(requests, disable_tqdm=True), calls=2)
    assert expected == found and len(found) == 3


def test_a_streamer_is_given_the_prompt_once(model, ids):
    plain, speculated, fallen = Recorder(), Recorder(), Recorder()
    model.generate(ids, streamer=plain, **GREEDY)
    with paceline.patch(model, "ngram", seed=[1, 2]) as patched, pytest.warns(UserWarning, match="2 entries"):
        model.generate(ids, streamer=fallen, **GREEDY)  # refused after transformers has prepared it
    with paceline.patch(model, "ngram") as patched:
        model.generate(ids, streamer=speculated, **GREEDY)
    assert plain.puts == speculated.puts == fallen.puts and patched.speculated == 1
    assert plain.ended == speculated.ended == fallen.ended == 1


@pytest.mark.filterwarnings("default")  # what PEFT uses is its own affair
def test_peft(model, ids):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False)).eval()
    expected, found = same(wrapped, lambda: wrapped.generate(input_ids=ids, **GREEDY))
    assert torch.equal(expected, found)
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)).eval()
    expected = wrapped.generate(input_ids=ids, **GREEDY)
    with paceline.patch(wrapped, "ngram") as patched, pytest.warns(UserWarning, match="was replaced"):
        assert torch.equal(wrapped.generate(input_ids=ids, **GREEDY), expected) and patched.speculated == 0
