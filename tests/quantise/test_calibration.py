"""What is read of a calibration file: conversations and texts as they are, prompts with the model's own answers."""

import json

import pytest
from paceline.spec.quantise.calibration import ANSWER, LENGTH, read_entries, read_texts, spread

from support.sentences import sentence

WORDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def file(tmp_path):
    def write(*entries):
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "texts.jsonl")

    return write


def test_texts_are_taken_as_they_are(original, tokenizer, file):
    texts = [WORDS[start:] + WORDS[:start] for start in range(9)]
    read = read_texts(original, tokenizer, file(*({"text": text} for text in texts)), 6)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [text.tokens for text in read.held_out] == ids[1::3] and {text.begin for text in read.held_out} == {1}
    assert read.calibration == [tokens for number, tokens in enumerate(ids) if number % 3 != 1]


def test_of_a_conversation_the_answer_counts(original, tokenizer, file):
    def conversation(start):
        answer = {"role": "assistant", "content": WORDS[1:]}
        return {"messages": [{"role": "user", "content": WORDS[start : start + 7]}, answer]}

    # The template ends with an "A" that asks for an answer, which is no beginning of the whole: all of it counts.
    read = read_texts(original, tokenizer, file(*map(conversation, range(3))), 2)
    assert [text.begin for text in read.held_out] == [1] and len(read.held_out[0].tokens) == 7 + len(WORDS)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    try:
        read = read_texts(original, tokenizer, file(*map(conversation, range(3))), 2)
    finally:
        tokenizer.chat_template = template
    assert [text.begin for text in read.held_out] == [7]


@pytest.mark.parametrize("form", ["prompt", "turns", "messages"])
def test_prompts_are_answered_by_the_model(original, tokenizer, file, form):
    prompts = ["ABC", "BCD", "CDE"]
    entries = {
        "prompt": [{"prompt": prompt} for prompt in prompts],
        "turns": [{"turns": [prompt, "and"]} for prompt in prompts],
        "messages": [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts],
    }[form]
    read = read_texts(original, tokenizer, file(*entries), 2)
    (held,) = read.held_out
    assert held.tokens[:4] == tokenizer("BCDA")["input_ids"] and held.begin == 4
    assert len(held.tokens) == 4 + ANSWER <= LENGTH
    assert [tokens[:4] for tokens in read.calibration] == [tokenizer(p + "A")["input_ids"] for p in ("ABC", "CDE")]


def test_one_prompt_is_on_one_side_alone(file):
    """Several answers to a prompt are no different texts."""
    answers = [
        {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": word}]} for word in WORDS
    ]
    assert len(read_entries(file(*answers, {"prompt": "ABC"}, {"prompt": "ABD"}))) == 2


def test_entries_are_spread_over_the_file():
    entries = [{"text": word} for word in "abcdefghij"]
    assert [entry["text"] for entry in spread(entries, 5)] == list("acegi") and spread(entries, 99) == entries


BROKEN = {
    "no JSON": ["{"],
    "a number": ["3"],
    "nothing known": [{"question": "Why?"}],
    "an empty prompt": [{"prompt": " "}],
    "no turns": [{"turns": []}],
    "messages that are none": [{"messages": [{"role": "user"}]}],
}


@pytest.mark.parametrize("name", BROKEN)
def test_lines_that_are_none_are_named(file, name):
    sentence(lambda: read_entries(file({"prompt": "ABC"}, *BROKEN[name])), "line 2", '{"prompt"')


def test_files_without_texts_are_refused(original, tokenizer, file, tmp_path):
    sentence(lambda: read_entries(str(tmp_path / "none.jsonl")), "none.jsonl", "JSONL")
    sentence(lambda: read_texts(original, tokenizer, file({"text": WORDS}), 4), "1 texts", "two")
    sentence(lambda: read_texts(original, tokenizer, file({"text": "A"}, {"text": "B"}), 4), "0 texts", "two")
