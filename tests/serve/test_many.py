"""`generate_many`: requests of all kinds through few rows, with what is told of each."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines import runs
from paceline.spec.serve.many import make_job
from serve.playing import ENDS, LETTERS, letters, pool

from support.models import noisy_copy, tiny_llama
from support.tape import tape_executor


@pytest.fixture(scope="module")
def draft(model):
    return ModelDrafter(noisy_copy(model))


EVERY_THIRD = range(0, 48, 3)
WAYS = {
    "as it is": dict(),
    "one row": dict(rows=1),
    "lookup, many rows": dict(drafter="ngram", rows=16, prefill_chunk=3),
    "chain": dict(drafter="draft", tree="chain:3", rows=5),
    "tree": dict(drafter="draft", tree="3x2x1", rows=8, prefill_chunk=1),
    "growing tree": dict(drafter="draft", tree="dynamic:8x3x3", rows=4),
}


@pytest.mark.parametrize("way", WAYS)
def test_neither_mates_nor_drafter_tree_chunk_nor_rows_matter(model, draft, way):
    options = dict(WAYS[way])
    if options.get("drafter") == "draft":
        options["drafter"] = draft
    order = sorted(EVERY_THIRD, key=lambda index: (index * (7 + len(way))) % 31)
    results = paceline.generate_many(model, [pool()[index][0] for index in order], tokenizer=letters(), **options)
    for index, result in zip(order, results):
        assert (result.tokens, result.text, result.reason) == pool()[index][1]
    if "drafter" in options:
        assert 0 < sum(result.accepted for result in results) < sum(result.drafted for result in results)


def test_trees_whose_scores_are_computed_along_the_path(model, draft, monkeypatch):
    monkeypatch.setattr(runs, "MOST_SCORES", 1)
    requests = [asked for asked, _ in pool()[1::3]]
    results = paceline.generate_many(model, requests, tokenizer=letters(), drafter=draft, tree="2x2x1", rows=5)
    assert [(result.tokens, result.text, result.reason) for result in results] == [truth for _, truth in pool()[1::3]]


def test_a_recorded_step_serves_requests_of_all_kinds(model, draft, monkeypatch):
    """Under the rules of a captured step: settings of rows are data, penalties and biases too."""
    with tape_executor(monkeypatch) as tapes:
        results = paceline.generate_many(
            model, [asked for asked, _ in pool()[2::3]], tokenizer=letters(), drafter=draft, rows=4, executor="tape"
        )
    assert [(result.tokens, result.text, result.reason) for result in results] == [truth for _, truth in pool()[2::3]]
    assert len(tapes) == 1 and tapes[0].tape.offences == [] and tapes[0].replays > 10
    runs.reset(model)


def test_what_is_told_while_tokens_come(model):
    told = {}
    asked = [dict(prompt=[31, 40, 52], max_new_tokens=9, end_ids=()), dict(prompt=[33], max_new_tokens=3, end_ids=())]
    results = paceline.generate_many(
        model, asked, on_tokens=lambda index, new: told.setdefault(index, []).append([*new])
    )
    for index, result in enumerate(results):
        assert told[index][-1] == result.tokens and result.text is None and result.reason == "length"
        assert all(result.tokens[: len(new)] == new for new in told[index])


def test_a_seed_that_is_drawn_gives_the_text_again(model):
    asked = dict(prompt=[31, 40], max_new_tokens=9, temperature=1.2)
    first = paceline.generate_many(model, [asked])[0]
    again = paceline.generate_many(model, [asked | dict(seed=first.seed), asked | dict(seed=first.seed, choice=1)])
    assert again[0].tokens == first.tokens != again[1].tokens
    rows = torch.tensor([asked["prompt"]] * 2)  # choices are the rows of a call with one seed
    out = paceline.generate(
        model, rows, do_sample=True, temperature=1.2, top_k=0, seed=first.seed, max_new_tokens=9, pad_token_id=0
    )
    for row, result in zip(out[:, 2:].tolist(), again):
        assert row[: len(result.tokens)] == result.tokens


@torch.no_grad()
@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_logprobs_are_those_of_the_models_logits(model, drafter):
    """Of new tokens whatever the temperature and the penalties, and of the prompt's."""
    prompt = [31, 40, 52, 31, 40, 52, 31]
    asked = dict(prompt=prompt, max_new_tokens=6, temperature=0.8, seed=3, presence_penalty=1.0, end_ids=())
    few = asked | dict(logprobs=3, prompt_logprobs=2)
    result, other, scored = paceline.generate_many(
        model, [few, asked, few | dict(max_new_tokens=0)], drafter=drafter, rows=2, prefill_chunk=3
    )
    assert result.tokens == other.tokens and other.logprobs == other.prompt_logprobs == scored.tokens == []
    text = torch.tensor([prompt + result.tokens])
    truth = model(text, use_cache=False).logits[0].float().log_softmax(-1)
    told = [*result.prompt_logprobs, *result.logprobs]
    assert [one.token for one in told] == text[0, 1:].tolist()
    for position, one in enumerate(told):
        assert one.logprob == pytest.approx(float(truth[position, one.token]), abs=1e-4)
        values, tokens = truth[position].topk(2 if position < len(prompt) - 1 else 3)
        assert [token for token, _ in one.likeliest] == tokens.tolist()
        assert [value for _, value in one.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
    assert scored.reason == "length" and [one.logprob for one in scored.prompt_logprobs] == pytest.approx(
        [one.logprob for one in result.prompt_logprobs]
    )


@pytest.mark.parametrize("drafter", ["ngram", None])
def test_a_prediction_is_copied_from(model, drafter):
    """Fewer steps where it is right; the same text whatever it is."""
    plain, right, wrong = {}, {}, {}
    for number, temperature in enumerate((0.9, 1.3)):
        asked = dict(prompt=[31, 40], max_new_tokens=24, end_ids=(), temperature=temperature, seed=number)
        (plain[number],) = paceline.generate_many(model, [asked], drafter=drafter)
        others = [asked | dict(prediction=plain[number].tokens), asked | dict(prediction=[44, 45] * 90), asked]
        right[number], wrong[number], beside = paceline.generate_many(
            model, others, drafter=drafter, tree="chain:4", rows=2
        )
        assert plain[number].tokens == right[number].tokens == wrong[number].tokens == beside.tokens
        assert drafter is None or right[number].steps < 14 < min(wrong[number].steps, beside.steps)


def test_greedy_texts_ignore_how_tokens_are_drawn():
    """Also where the best tokens are equally good, of which sorting need not leave the first."""
    model = tiny_llama(seed=3, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[30:60] = model.lm_head.weight[:30]
    plain = dict(prompt=[31, 40], max_new_tokens=8, end_ids=())
    cut = plain | dict(top_p=0.01, top_k=1, min_p=1.0)
    rows = [make_job(model, None, one).request.sampling for one in (plain, cut, cut | dict(temperature=1.0))]
    assert rows[0] == rows[1] != rows[2]
    drawn = cut | dict(temperature=1.0, seed=3, top_p=0.9, top_k=9)
    result, alike, _ = paceline.generate_many(model, [plain, cut, drawn], rows=3)
    assert result.tokens == alike.tokens


def test_nothing_asked_for_is_nothing_given(model):
    assert paceline.generate_many(model, []) == []


REFUSED = {
    "a field that is none": (dict(prompt=[3], max_tokens=4), "does not take 'max_tokens'"),
    "no prompt": (dict(max_new_tokens=4), "needs a prompt"),
    "a prediction of nobody": (dict(prompt=[3], prediction=[61]), "prediction has a token id beyond"),
    "an empty prompt": (dict(prompt=[]), "prompt has no token"),
    "an unknown id": (dict(prompt=[3, 61]), "vocabulary of 61"),
    "a prompt of numbers": (dict(prompt=[3.5]), "a text or a list of token ids"),
    "a text without tokenizer": (dict(prompt="abc"), "needs a tokenizer"),
    "a stop without tokenizer": (dict(prompt=[3], stop="x"), "needs a tokenizer"),
    "an empty stop": (dict(prompt=[3], stop=[""]), "none of them empty"),
    "no new tokens": (dict(prompt=[3], max_new_tokens=0), "max_new_tokens=0"),
    "a cold temperature": (dict(prompt=[3], temperature=-1), "temperature=-1"),
    "no nucleus": (dict(prompt=[3], top_p=0), "top_p=0"),
    "no repetition": (dict(prompt=[3], repetition_penalty=0), "repetition_penalty=0"),
    "a penalty that is none": (dict(prompt=[3], presence_penalty="much"), "presence_penalty='much'"),
    "several seeds": (dict(prompt=[3], seed=[1, 2]), "a request has one seed"),
    "many logprobs": (dict(prompt=[3], logprobs=21), "logprobs=21"),
    "a bias of nobody": (dict(prompt=[3], logit_bias={61: 1.0}), "token 61"),
    "many biases": (dict(prompt=[3], logit_bias=dict.fromkeys(range(65), 1.0)), "at most 64"),
    "many ends": (dict(prompt=[3], end_ids=range(17)), "at most 16"),
    "beyond the context": (dict(prompt=[3] * 250, max_new_tokens=7), "context of 256"),
}


def test_texts_may_cross_a_length_at_which_rotary_embeddings_change(recwarn):
    """Each by its own length, whatever is beside it."""
    scaled = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    scaled |= {"original_max_position_embeddings": 32}
    model = tiny_llama(seed=3, num_hidden_layers=1, rope_parameters=scaled, max_position_embeddings=128)
    prompt, beside = [5] * 20, dict(prompt=[7] * 33, max_new_tokens=40)
    truth = paceline.generate(model, torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    results = paceline.generate_many(model, [beside, dict(prompt=prompt, max_new_tokens=30)], drafter="ngram")
    assert results[1].tokens == truth[0, 20:].tolist()


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence(model, what):
    request, words = REFUSED[what]
    with pytest.raises(ValueError, match="request 1: ") as refused:
        paceline.generate_many(model, [dict(prompt=[5]), request])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_settings_of_the_call_are_refused_too(model):
    for options, words in (
        (dict(rows=0), "rows=0"),
        (dict(executor="fast"), "executor='fast'"),
        (dict(drafter=3), "int"),
    ):
        with pytest.raises(ValueError, match=words):
            paceline.generate_many(model, [dict(prompt=[5])], **options)


def test_prompts_and_stops_may_be_text(model):
    prompt = "".join(LETTERS[token] for token in (31, 40, 52))
    whole = paceline.generate_many(model, [dict(prompt=prompt, max_new_tokens=12, end_ids=())], tokenizer=letters())[0]
    stop = whole.text[4:6]
    cut = paceline.generate_many(
        model, [dict(prompt=prompt, max_new_tokens=12, end_ids=(), stop=stop)], tokenizer=letters(), drafter="ngram"
    )[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.reason == "stop" and ENDS
