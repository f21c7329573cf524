"""What an entry says, in every form that people have; and why one says nothing."""

import json

import pytest
from paceline.spec.data.content import Unfit
from paceline.spec.data.forms import parse_columns, record

from support.sentences import sentence

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"role": "tool", "content": "3"}


def said(entry, **columns):
    return record(entry, 1, "line 1", columns)


def part(text):
    return {"type": "text", "text": text}


FORMS = [
    ({"prompt": "Why?"}, "prompts", [USER]),
    ({"prompt": "Why?", "messages": None, "text": None}, "prompts", [USER]),
    ({"turns": ["Why?", "And?"]}, "turns", [USER, {"role": "user", "content": "And?"}]),
    ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
    ({"messages": [USER, ANSWER], "text": None, "prompt": "Why?"}, "messages", [USER, ANSWER]),
    ([USER, ANSWER], "messages", [USER, ANSWER]),
    ({"conversation": [USER, ANSWER]}, "messages", [USER, ANSWER]),
    (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be short."},
        "ShareGPT",
        [SYSTEM, USER, ANSWER],
    ),
    (
        {
            "conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Why?"}],
            "system": "X",
        },
        "ShareGPT",
        [SYSTEM, USER],
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
            ]
        },
        "ShareGPT",
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    ),
    ({"instruction": "Why?", "input": "", "output": "So."}, "Alpaca", [USER, ANSWER]),
    ({"instruction": "Why", "context": "this?"}, "Alpaca", [{"role": "user", "content": "Why\n\nthis?"}]),
    (
        {"instruction": "Why?", "output": "So.", "history": [["Who?", "I."]], "system": "Be short.", "text": "### "},
        "Alpaca",
        [SYSTEM, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}, USER, ANSWER],
    ),
    ({"prompt": "Why?", "completion": "So."}, "prompt/completion", [USER, ANSWER]),
    ({"prompt": "Why?", "response": "So.", "system_prompt": "Be short."}, "prompt/completion", [SYSTEM, USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, "prompt/completion", [SYSTEM, USER, ANSWER]),
    ({"prompt": [USER]}, "prompts", [USER]),
    ({"messages": [{"role": "user", "content": [part("Wh"), "y?"]}, ANSWER]}, "messages", [USER, ANSWER]),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "7", "function": {"name": "add", "arguments": '{"a": 1}'}}],
                    "audio": None,
                },
                {"role": "tool", "content": "3", "tool_call_id": "7"},
                ANSWER,
            ]
        },
        "messages",
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"id": "7", **CALL}]},
            {**RESULT, "tool_call_id": "7"},
            ANSWER,
        ],
    ),
]


@pytest.mark.parametrize(
    ("entry", "form", "messages"), FORMS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_form_is_read(entry, form, messages):
    for given in (entry, json.loads(json.dumps(entry))):
        made = said(given)
        assert (made.form, list(made.messages), made.text) == (form, messages, None)
    assert made.turns == tuple(message["content"] for message in messages if message["role"] == "user")
    assert made.system == (messages[0]["content"] if messages[0]["role"] == "system" else None)


def test_what_is_said_about_a_record_is_kept():
    made = said({"text": "abc", "id": 7, "category": "math", "source": None})
    assert (made.text, made.id, made.category, made.source, made.form) == ("abc", "7", "math", None, "text")
    made = said(
        {"messages": [USER, ANSWER], "token_ids": [[3, 4]], "finished": False, "tools": '[{"type": "function"}]'}
    )
    assert (made.token_ids, made.finished, made.tools) == ([[3, 4]], False, [{"type": "function"}])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (5, "it is a JSON number and no object"),
        (None, "it is a JSON null and no object"),
        ({}, "it is of no known form (it has nothing)"),
        ({"question": "?", "answer": "!"}, "it is of no known form (it has question, answer)"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": "Why?"}, "'messages' is no list of messages"),
        ({"messages": ["Why?"]}, "'messages' is no list of messages"),
        ({"messages": [{"content": "Why?"}]}, "the role of a message is not known (None)"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "the role of a message is not known ('narrator')"),
        ({"messages": [{"role": "user", "content": None}]}, "a message has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content of a message is no text"),
        (
            {"messages": [{"role": "user", "content": [part("x"), {"type": "image_url", "image_url": {}}]}]},
            "a part of a message is no text (but image_url)",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of a tool call is no JSON object",
        ),
        ({"turns": [5]}, "a user turn is no text"),
        ({"instruction": 5}, "'instruction' is no text"),
        ({"instruction": "x", "history": ["x"]}, "'history' is no list of pairs"),
        ({"prompt": {"a": 1}}, "'prompt' is no text"),
        ({"text": ["abc"]}, "'text' is no text"),
        ({"prompt": "x", "system": ["y"]}, "'system' is no text"),
        ({"prompt": "x", "tools": "{"}, "'tools' is no JSON"),
        ({"prompt": "x", "tools": [5]}, "'tools' is no list of objects"),
        ({"prompt": "x", "finished": "no"}, "'finished' is neither true nor false"),
        *(
            ({"prompt": "x", "token_ids": ids}, "'token_ids' is no list with a list of token ids for each answer")
            for ids in (5, "ab", [5], [[True]], [[-1]], [["a"]], [[1.0]], {"a": 1})
        ),
    ],
)
def test_what_is_none_is_named(entry, words):
    with pytest.raises(Unfit) as caught:
        said(entry)
    assert str(caught.value) == words


def test_columns_stand_for_fields():
    columns = parse_columns("prompt=question, completion=answer")
    entry = {"question": "Why?", "answer": "So.", "messages": [ANSWER], "id": "x"}
    made = said(entry, **columns)
    assert (made.form, made.messages, made.id) == ("prompt/completion", (USER, ANSWER), "x")
    assert said({"content": "abc", "prompt": "p"}, text="content").text == "abc"
    assert said({"prompt": "Why?", "gold": "So."}, completion="gold").messages == (USER, ANSWER), "the rest is as it is"
    assert said({"prompt": "Why?", "question_id": 81}, id="question_id").id == "81"
    with pytest.raises(Unfit, match=r"it has no question \(but prompt\)"):
        said({"prompt": "x"}, **columns)
    for wrong in ("prompt", "prompt=", "promt=question", "=x"):
        sentence(lambda wrong=wrong: parse_columns(wrong), "--columns", repr(wrong), "prompt=question")
    assert parse_columns(None) == {}
