"""`patch`: whatever calls `model.generate` gets the same text by speculation, what Paceline refuses comes from
transformers with one warning per reason, and nothing is left behind."""

import copy
import inspect
import io
import pickle
import warnings

import paceline
import pytest
import torch
from paceline.spec.target.slots import cache_argument
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList, pipeline

from conftest import tiny_llama

GREEDY = dict(max_new_tokens=16, do_sample=False)
PROMPT = "ABCDEABCDEABC"


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def ids():
    torch.manual_seed(3)
    return torch.randint(1, 61, (1, 9))


@pytest.fixture(autouse=True)
def strict():
    """A fall back that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="transformers' own generate decodes")
        yield


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


REFUSED = {
    "beams": (dict(num_beams=2), "num_beams=2"),
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
    "no cache": (dict(use_cache=False), "use_cache"),
    "positions": (dict(position_ids=torch.arange(9)[None]), "position_ids would go to the model"),
    "no prompt": (dict(inputs=None, bos_token_id=1), "input_ids is NoneType"),
    "beyond the context": (dict(max_new_tokens=250), "context of 256"),
    "padding on the right": (dict(attention_mask=torch.tensor([[1] * 8 + [0]])), "on the left"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_comes_from_transformers_with_one_warning(model, ids, options, reason):
    options = {"inputs": ids, **GREEDY, **options}
    expected = model.generate(**options)
    with paceline.patch(model, "ngram") as patched:
        with pytest.warns(UserWarning, match=reason) as seen:
            found = [model.generate(**options) for _ in range(2)]
    assert len([w for w in seen if "transformers' own" in str(w.message)]) == 1 and seen[0].filename == __file__
    assert patched.speculated == 0 and list(patched.fell_back.values()) == [2]
    for one in found:
        assert torch.equal(getattr(one, "sequences", one), getattr(expected, "sequences", expected))


def test_a_reason_is_one_whatever_its_numbers(model, ids):
    model.train()
    with paceline.patch(model) as patched:
        with pytest.warns(UserWarning, match="is in training mode"):
            model.generate(ids, **GREEDY)
        model.eval()
        with pytest.warns(UserWarning, match="num_beams=2"):
            model.generate(ids, num_beams=2, **GREEDY)
        model.generate(ids, num_beams=3, **GREEDY)
        with pytest.warns(UserWarning, match="contrastive"), pytest.raises(ValueError, match="trust_remote_code"):
            model.generate(ids, penalty_alpha=0.5, top_k=4, max_new_tokens=3)  # as without a patch
    assert list(patched.fell_back.values()) == [1, 2, 1]


def test_the_callers_own_speculation_is_respected_in_silence(model, target, ids):
    with paceline.patch(model, "ngram") as patched, paceline.patch(target, "ngram") as assistant:
        assert torch.equal(model.generate(ids, assistant_model=target, **GREEDY), target.generate(ids, **GREEDY))
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
        model.generate(ids, custom_generate=lambda model, input_ids, **_: input_ids, **GREEDY)
    assert patched.speculated == 0 and sum(patched.fell_back.values()) == 3
    assert assistant.speculated == 1  # its cache was asked for by the other calls


def mistaken(row, text):
    if len(text) > 10:
        raise ValueError("the user's own mistake")
    return [3, 4]


def test_errors_of_the_user_and_of_decoding_are_no_fall_back(model, ids):
    with paceline.patch(model, "ngram") as patched:
        with pytest.raises(ValueError, match="own mistake"):
            model.generate(ids, prefix_allowed_tokens_fn=mistaken, **GREEDY)
        with pytest.raises(ValueError, match="Input length"):
            model.generate(ids, max_length=3)
        with pytest.raises(TypeError):
            model.generate(ids, inputs=ids)
    assert not patched.fell_back and not patched.speculated


def test_a_streamer_is_given_the_prompt_once(model, ids):
    plain, speculated, fallen = Recorder(), Recorder(), Recorder()
    model.generate(ids, streamer=plain, **GREEDY)
    with paceline.patch(model, "ngram", seed=[1, 2]) as patched, pytest.warns(UserWarning, match="2 entries"):
        model.generate(ids, streamer=fallen, **GREEDY)  # refused after transformers has prepared it
    with paceline.patch(model, "ngram") as patched:
        model.generate(ids, streamer=speculated, **GREEDY)
    assert plain.puts == speculated.puts == fallen.puts and patched.speculated == 1
    assert plain.ended == speculated.ended == fallen.ended == 1


def test_nothing_is_left(model, ids):
    before, signature = dict(vars(model)), inspect.signature(model.generate)
    for _ in range(2):
        paceline.patch(model)
        assert inspect.signature(model.generate) == signature and model.generate.__doc__
        model.generate(ids, **GREEDY)
    paceline.unpatch(model)
    paceline.unpatch(model)
    assert vars(model) == before
    with pytest.raises(KeyError), paceline.patch(model, "ngram"):
        raise KeyError
    assert vars(model) == before


def test_patches_nest(model, ids):
    first = paceline.patch(model, "ngram", tree="chain:2")
    with paceline.patch(model, "ngram", tree="chain:4") as second:
        model.generate(ids, **GREEDY)
        third = paceline.patch(model, None)
        model.generate(ids, **GREEDY)
    model.generate(ids, **GREEDY)
    assert [first.speculated, second.speculated, third.speculated] == [1, 1, 1]
    with second:
        paceline.unpatch(model)
        assert "generate" not in vars(model)
    assert vars(model)["_paceline_patch"] is first
    paceline.unpatch(model)
    assert "_paceline_patch" not in vars(model)


def test_somebodys_own_generate_is_neither_passed_by_nor_removed(model, ids):
    with paceline.patch(model, "ngram") as patched:
        inner = model.generate
        model.generate = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
        assert model.generate(ids, **GREEDY).shape == (1, 25) and patched.speculated == 1
        with pytest.raises(ValueError, match="somebody's own"):
            paceline.patch(model, "ngram")
    assert model.generate is wrapper and model.generate(ids, **GREEDY).shape == (1, 25)
    assert patched.speculated == 1
    with pytest.raises(ValueError, match="somebody's own"):
        paceline.patch(model, "ngram")


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: [torch.save(model, f := io.BytesIO()), f.seek(0), torch.load(f, weights_only=False)][2],
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_not_patched(model, ids, duplicate):
    expected = model.generate(ids, **GREEDY)
    with paceline.patch(model, "ngram") as patched:
        other = duplicate(model)
        assert vars(other).keys() == vars(tiny_llama()).keys()
        assert torch.equal(other.generate(ids, **GREEDY), expected) and patched.speculated == 0
        assert torch.equal(model.generate(ids, **GREEDY), expected) and patched.speculated == 1


def test_saving_and_wrapping(model, ids, tmp_path):
    expected = model.generate(ids, **GREEDY)
    compiled = torch.compile(model)
    with paceline.patch(compiled, "ngram") as patched:
        model.save_pretrained(tmp_path)
        assert torch.equal(compiled.generate(ids, **GREEDY), expected) and patched.speculated == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **GREEDY), expected)


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


def test_the_summary_adds_up(model, ids):
    patched, single = paceline.patch(model, "ngram"), []
    for prompt in (ids, ids.flip(1)):
        model.generate(prompt, **GREEDY)
        out = paceline.generate(model, prompt, drafter="ngram", return_dict_in_generate=True, **GREEDY)
        single.append(out.trace.summary())
    total = patched.summary()
    counts = {name: single[0][name] + single[1][name] for name in total if name.startswith("num_")}
    assert counts["num_tokens"] == 32 and counts.items() <= total.items()
    assert total["tokens_per_step"] == 32 / counts["num_spec_steps"]
    assert total["seconds"].keys() == single[0]["seconds"].keys()


USELESS = {
    "no-such-folder": dict(drafter="no-such-folder/at/all"),
    "drafter is a int": dict(drafter=3),
    "verify='mostly'": dict(verify="mostly"),
    "executor='magic'": dict(executor="magic"),
    "round": dict(tree="round"),
    "does not take 'max_new_tokens'": dict(max_new_tokens=3),
    "cannot be written": dict(trace_file="/no/such/folder/t.jsonl"),
}


@pytest.mark.parametrize("reason, settings", USELESS.items(), ids=USELESS)
def test_settings_that_no_call_could_use(model, reason, settings):
    with pytest.raises(ValueError, match=reason):
        paceline.patch(model, **settings)
    assert "generate" not in vars(model)
    with pytest.raises(ValueError, match="no transformers model"):
        paceline.patch(torch.nn.Linear(2, 2))
