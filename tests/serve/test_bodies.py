"""Bodies that the server does not take: each is refused in one sentence that names what is wrong."""

import contextlib
import http.client
import json

import pytest
from paceline.spec.serve.bodies import CHAT, COMPLETION, BadBody
from paceline.spec.serve.json_text import read_json
from serve.served import CONTENTED, ask, listening, serving_of


@pytest.fixture(scope="module")
def url():
    with listening(serving_of()) as address:
        yield address


CHAT_FIELDS = {
    "model": [3, "", "gpt", [], "\ud800"],
    "messages": [3, "hello", [], [3], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "tool", "content": "x"}],
                 [{"role": "user", "content": 3}], [{"role": "user", "content": []}],
                 [{"role": "user", "content": [3]}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                 [{"role": "user", "content": "x", "tool_calls": [{}]}], [{"role": "user", "content": "@" * 70}],
                 [{"role": "user", "content": "\udc00"}], {"role": "user", "content": "x"}],
    "temperature": ["hot", -0.1, 1e9, True, [], {}],
    "top_p": [0, 1.1, "x", -1],
    "top_k": [1.5, "x", -2, True, 1025],
    "min_p": [-1, 2, "x"],
    "repetition_penalty": [0, -1, "x"],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [-2.1, 2.1, "x", {}],
    "logit_bias": [3, [], {"x": 1}, {"3": "y"}, {"3": 101}, {"61": 1}, {"-1": 1}, {str(n): 1 for n in range(65)},
                   {"1_0": 1}, {" 3": 1}, {"3": 1, "03": 1}, {"9" * 5000: 1}],
    "seed": ["x", 1.5, True, 2**70, []],
    "n": [0, -1, 1.5, "2", 129, 9, True],
    "stop": [3, [3], [""], "", ["a"] * 5, {}],
    "stop_token_ids": [3, ["x"], [-1], [61], [2**63], list(range(20)), [1.5]],
    "ignore_eos": [1, "true", []],
    "stream": [1, "true", {}],
    "stream_options": [3, {"include_usage": True}, {"x": 1}],
    "user": [3, []],
    "max_tokens": [0, -1, 1.5, "x", 100, True, 1e30],
    "max_completion_tokens": [0, -1, "x", 65],
    "logprobs": [1, "x"],
    "top_logprobs": [1, -1, 21, "x"],
    "response_format": [{"type": "json_object"}, "text", 3],
    "tools": [[{"type": "function"}], 3],
    "tool_choice": ["auto", {"type": "function"}],
    "modalities": [["audio"], "text"],
    "service_tier": ["flex", 3],
    "store": [True, 1.5, 0],
    "prediction": [3, {"type": "content"}, {"type": "x", "content": "y"}],
    "reasoning_effort": ["low"], "functions": [[]], "audio": [{}], "web_search_options": [{}], "verbosity": ["low"],
    "parallel_tool_calls": [True], "max_token": [3], "guided_json": [{}], "chat_template": ["x"], "prompt": ["x"],
    "echo": [True],
}  # fmt: skip
COMPLETION_FIELDS = {
    "prompt": [
        3,
        "",
        [],
        [[]],
        ["x", 3],
        [1.5],
        [[1, "x"]],
        [-1],
        [61],
        ["x"] * 129,
        ["x"] * 9,
        {},
        "@" * 70,
        "\ud800",
    ],
    "logprobs": [-1, 21, True, "x"],
    "echo": [1, "x"],
    "best_of": [2, "x", True],
    "suffix": ["tail", 3],
    "messages": [[{"role": "user", "content": "x"}]],
    "max_tokens": [0, -1, "x", 99],
}
RAW = [
    b"",
    b"{",
    b"[]",
    b"3",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b'{"messages": NaN',
    b"[" * 100_000,
    b"{}",
    b'{"model": "toy"}',
]


def bad_bodies():
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for fields, path, good in (
        (CHAT_FIELDS, "/v1/chat/completions", chat),
        (COMPLETION_FIELDS, "/v1/completions", {"prompt": "x"}),
    ):
        for name, values in fields.items():
            yield from ((path, name, {**good, name: value}) for value in values if value is not None)
        yield from ((path, None, raw) for raw in RAW)
    common = {**CHAT_FIELDS, **COMPLETION_FIELDS}
    for name in ("temperature", "top_p", "seed", "stop", "n", "logit_bias", "stream", "stream_options"):
        yield from (("/v1/completions", name, {"prompt": "x", name: value}) for value in common[name])


def test_two_hundred_bad_bodies_are_each_refused_in_a_sentence(url):
    bodies, fields = [*bad_bodies()], set()
    for path, name, body in bodies:
        status, said = ask(url, body, path)
        told = json.loads(said)["error"]
        assert 400 <= status < 500 and told.keys() == {"message", "type", "param", "code"}, (name, body, status)
        message = told["message"]
        assert "\n" not in message and 10 < len(message) < 300 and "Traceback" not in message, message
        if name is not None:
            root = (told["param"] or "").split(".")[0].split("[")[0]
            assert root == name or name in message, (name, body, told)
            fields.add(name)
    assert len(bodies) >= 200 and fields >= {*CHAT, *COMPLETION} - {"user"}
    assert ask(url, CONTENTED)[0] == 200, "and the server goes on"


MEANINGLESS = [
    10**400,
    -(10**400),
    1e999,
    float("nan"),
    float("-inf"),
    "\ud800",
    ["\udfff"],
    {"\ud800": 1},
    [[[10**80]]],
]


def test_what_no_number_and_no_text_is_refused_wherever_it_stands(url):
    """In every field, in fields that there are not, and as a field's name."""
    deep = json.loads("[" * 40 + "]" * 40)
    chat = {"messages": [{"role": "user", "content": "x"}]}
    paths = {"/v1/chat/completions": (CHAT, chat), "/v1/completions": (COMPLETION, {"prompt": "x"})}
    for path, (fields, good) in paths.items():
        bodies = [{**good, name: value} for name in [*fields, "no field"] for value in [*MEANINGLESS, deep]]
        bodies += [{**good, "\ud800": 1}, {**good, "user": {"x": [{"\ud800": 1}]}}, {**good, "stop": ["a", "\ud800"]}]
        for body in bodies if path.startswith("/v1/chat") else bodies[::5]:
            status, said = ask(url, body, path)
            message = json.loads(said)["error"]["message"]
            assert status == 400 and "\n" not in message and 10 < len(message) < 200, (body, status, message)
    for raw, words in (
        (b'{"prompt": "x", "prompt": "y"}', "names 'prompt' twice"),
        (b'{"prompt": "x", "logit_bias": {"3": 1, "3": 2}}', "names '3' twice"),
        (b'{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', "twice"),
        (b'{"prompt": "x", "top_p": NaN}', "NaN"),
        (b'{"prompt": "x", "top_p": 1e999}', "too large"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "no JSON"),
    ):
        status, said = ask(url, raw, "/v1/completions")
        assert status == 400 and words in json.loads(said)["error"]["message"]


def test_one_of_very_many_names_that_comes_twice_is_found_in_one_pass():
    """Looking through all names for each of them would take an hour."""
    names = [*(f"{number:x}" for number in range(200_000)), "30d3f"]
    with pytest.raises(BadBody, match="names '30d3f' twice"):
        read_json(("{" + ",".join(f'"{name}":0' for name in names) + "}").encode())


@pytest.mark.parametrize("lists, fits", [(32, True), (33, False)])
def test_thirty_two_lists_and_objects_may_be_in_one_another(lists, fits):
    """In a field, or where the body is none but a list."""
    deep = "[" * lists + "1" + "]" * lists
    for body in (f'{{"x": {deep}}}', deep):
        with contextlib.nullcontext() if fits else pytest.raises(BadBody, match="more than 32"):
            read_json(body.encode())


def test_a_fields_name_is_said_in_one_line_and_cut(url):
    for name in ("a\nb", "x" * 100_000, "\u0000", "\u2028\u202e"):
        for body in ({name: 1}, {name: 10**400}, {name: "\ud800"}, {"stream_options": {name: True}, "stream": True}):
            status, said = ask(url, CONTENTED | body)
            told = json.loads(said)["error"]
            assert status == 400 and len(told["message"].splitlines()) == 1 and len(told["message"]) < 200
            assert told["message"].isprintable() and len(told["param"]) <= 80


@pytest.mark.parametrize("seed", [2**64, -(2**63), 2**63])
def test_a_seed_has_64_bits(url, seed):
    status, said = ask(url, CONTENTED | dict(seed=seed))
    assert status == 200 and json.loads(said)["seed"] == seed


def test_wrong_paths_methods_and_sizes(url):
    assert ask(url, {}, "/v1/embeddings")[0] == 404
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/v1/completions")
    reply = connection.getresponse()
    assert reply.status == 405 and "error" in json.loads(reply.read())
    connection.close()
    status, said = ask(url, b'{"x": "' + b"y" * (5 << 20) + b'"}')
    assert status == 413 and "4,194,304 bytes" in json.loads(said)["error"]["message"]


def test_what_is_predicted_and_null_is_as_if_it_were_not_there(url):
    nothing = dict.fromkeys(("top_p", "stop", "logit_bias", "stream", "n", "tools", "response_format"), None)
    harmless = dict(user="me", tools=[], tool_choice="none", response_format={"type": "text"}, store=False, top_k=-1)
    answers = [json.loads(ask(url, {**CONTENTED, **more})[1]) for more in ({}, nothing, harmless)]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
