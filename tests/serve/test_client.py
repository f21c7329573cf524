"""The server by OpenAI's own client: answers, streams, choices, log-probabilities, and what is told of them."""

import asyncio

import openai
import pytest
import torch
from paceline.spec.serve.text_request import TextRequest
from serve.playing import LETTERS, alone, letters
from serve.served import CONTENTED, listening, serving_of, truth


@pytest.fixture(scope="module")
def url():
    with listening(serving_of()) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


# By OpenAI's client.


def test_an_answer_is_the_text_that_the_request_gives_alone(model, client):
    answer = client.chat.completions.create(**CONTENTED)
    tokens, text, reason = truth(model, "@IU", seed=3)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == reason and answer.model == "toy" and answer.object == "chat.completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, len(tokens))
    assert usage.total_tokens == 5 + len(tokens)
    again = client.chat.completions.create(**CONTENTED | dict(seed=openai.omit))
    seed = again.model_extra["seed"]
    assert again.choices[0].message.content == truth(model, "@IU", seed=seed)[1], "a drawn seed gives the text again"


def test_settings_reach_the_rows(model, client):
    settings = dict(presence_penalty=0.7, frequency_penalty=-0.4, top_p=0.8, temperature=0.9)
    extra = dict(top_k=9, min_p=0.01, repetition_penalty=1.2)
    answer = client.chat.completions.create(**CONTENTED | settings | dict(logit_bias={"40": 2}), extra_body=extra)
    _, text, _ = truth(model, "@IU", seed=3, logit_bias={40: 2.0}, **settings, **extra)
    assert answer.choices[0].message.content == text
    greedy = client.chat.completions.create(**CONTENTED | dict(temperature=0), extra_body=dict(ignore_eos=True))
    assert greedy.choices[0].message.content == truth(model, "@IU", temperature=0.0, end_ids=())[1]
    assert len(greedy.choices[0].message.content) >= 10
    said = greedy.choices[0].message.content
    stop = said[4:7]
    cut = client.chat.completions.create(
        **CONTENTED | dict(temperature=0, stop=[stop]), extra_body=dict(ignore_eos=True)
    )
    assert cut.choices[0].message.content == said[: said.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < greedy.usage.completion_tokens


def test_choices_have_texts_of_their_own(model, client):
    answer = client.chat.completions.create(**CONTENTED, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    told = [choice.message.content for choice in answer.choices]
    assert told == [truth(model, "@IU", seed=3, choice=choice)[1] for choice in range(3)] and len({*told}) == 3
    assert answer.usage.prompt_tokens == 5


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_brings_the_same_text(model, client, n):
    events = list(client.chat.completions.create(**CONTENTED, n=n, stream=True, stream_options={"include_usage": True}))
    for choice in range(n):
        mine = [event.choices[0] for event in events if event.choices and event.choices[0].index == choice]
        assert mine[0].delta.role == "assistant" and [one.finish_reason for one in mine[:-1]] == [None] * (
            len(mine) - 1
        )
        _, text, reason = truth(model, "@IU", seed=3, choice=choice)
        assert "".join(one.delta.content or "" for one in mine) == text and mine[-1].finish_reason == reason
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 0 and events[0].usage is None
    assert len({event.id for event in events}) == 1


def test_many_clients_at_a_time(model, url):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=30) as client:

            async def one(number):
                content = "@IU"[: 1 + number % 3] + LETTERS[40 + number]
                body = CONTENTED | dict(messages=[dict(role="user", content=content)], seed=number)
                if number % 2:
                    stream = await client.chat.completions.create(**body, stream=True)
                    said = "".join([event.choices[0].delta.content or "" async for event in stream])
                else:
                    said = (await client.chat.completions.create(**body)).choices[0].message.content
                return said, truth(model, content, seed=number)[1]

            return await asyncio.gather(*map(one, range(8)))

    for said, text in asyncio.run(all_of_them()):
        assert said == text


def test_logprobs_in_both_forms(model, client):
    answer = client.chat.completions.create(**CONTENTED, logprobs=True, top_logprobs=2)
    tokens, _, _ = truth(model, "@IU", seed=3)
    told = answer.choices[0].logprobs.content
    assert [one.token for one in told] == [LETTERS[token] for token in tokens]
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob + 1e-6 for one in told)
    assert bytes(told[0].bytes).decode() == told[0].token
    streamed = client.chat.completions.create(**CONTENTED, logprobs=True, top_logprobs=2, stream=True)
    choices = [event.choices[0] for event in streamed]
    again = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert [(one.token, one.logprob) for one in again] == [(one.token, one.logprob) for one in told]


@torch.no_grad()
def test_a_prompt_is_scored_as_evaluation_harnesses_ask(model, client):
    """Echoed, with the log-probabilities of its own tokens: as lm-eval's local-completions has it."""
    prompts = [[31, 40, 52, 44, 35], [33, 40]]
    answer = client.completions.create(model="toy", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    nothing_new = client.completions.create(model="toy", prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    for ids, choice, bare in zip(prompts, answer.choices, nothing_new.choices):
        scores = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        told = choice.logprobs
        assert choice.text == "".join(LETTERS[token] for token in ids) + told.tokens[-1]
        assert told.tokens[:-1] == [LETTERS[token] for token in ids] and told.token_logprobs[0] is None
        expected = [float(scores[position, token]) for position, token in enumerate(ids[1:])]
        assert told.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
        best = [float(scores[position].max()) for position in range(len(ids) - 1)]
        assert [max(top.values()) for top in told.top_logprobs[1:-1]] == pytest.approx(best, abs=1e-4)
        assert told.text_offset == list(range(len(ids) + 1))
        assert bare.text == choice.text[:-1] and bare.logprobs.token_logprobs == pytest.approx(told.token_logprobs[:-1])
        assert bare.finish_reason == "length"


def test_completions_of_texts_and_ids(model, client):
    asked = TextRequest(prompt=[31, 40], max_new_tokens=16, temperature=0.0).checked()
    _, text, _ = alone(model, asked, letters())
    answer = client.completions.create(model="toy", prompt=["@I", [31, 40]], temperature=0)
    assert [choice.text for choice in answer.choices] == [text, text], "16 new tokens where nothing is said"
    events = client.completions.create(model="toy", prompt="@I", temperature=0, stream=True, echo=True)
    assert "".join(event.choices[0].text for event in events) == "@I" + text


def test_models_and_what_is_not_one(client):
    assert [one.id for one in client.models.list()] == ["toy"] and client.models.retrieve("toy").id == "toy"
    for call in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.chat.completions.create(**CONTENTED | dict(model="gpt")),
    ):
        with pytest.raises(openai.NotFoundError, match="ask for 'toy'"):
            call()


def test_usage_counts_drafts_as_predictions(client):
    content = "@IU" * 5 + "@@"  # nobody else's
    body = CONTENTED | dict(messages=[dict(role="user", content=content)], temperature=0, max_tokens=20)
    answer = client.chat.completions.create(**body, extra_body=dict(ignore_eos=True))
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0
    stream = client.chat.completions.create(
        **body, stream=True, stream_options=dict(include_usage=True), extra_body=dict(ignore_eos=True)
    )
    again = list(stream)[-1].usage
    assert again.completion_tokens_details == details and again.total_tokens == answer.usage.total_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens < again.prompt_tokens_details.cached_tokens == 16


def test_a_stream_says_which_tokens_were_drafted(client):
    body = CONTENTED | dict(temperature=0, max_tokens=20, stream=True, messages=[dict(role="user", content="@IU" * 5)])
    extra = dict(ignore_eos=True, stream_options=dict(include_drafts=True))
    events = [event.model_extra.get("drafts") for event in client.chat.completions.create(**body, extra_body=extra)]
    told = [drafts for drafts in events if drafts]
    pieces = [piece for drafts in told for piece in drafts["pieces"]]
    silent = 20 - len(pieces)  # special tokens, which say nothing
    assert silent < 9 and told[-1]["accepted"] - silent <= sum(drafted for _, drafted in pieces) <= told[-1]["accepted"]
    assert told[-1]["tokens"] == 20 and told[-1]["steps"] == 20 - told[-1]["accepted"]
