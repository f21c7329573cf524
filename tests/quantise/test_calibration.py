"""What is read of a calibration file: conversations and texts as they are, prompts with the model's own answers."""

import json

import pytest
from paceline.spec.data.reading import Reading
from paceline.spec.data.sources import open_source
from paceline.spec.quantise.calibration import ANSWER, LENGTH, read_records, read_texts

from support.sentences import sentence

WORDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def file(tmp_path):
    def write(*entries):
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        (tmp_path / "texts.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "texts.jsonl")

    return write


def texts_of(model, tokenizer, path, count):
    return read_texts(model, tokenizer, read_records(Reading(open_source(path)), count), path)


def test_texts_are_taken_as_they_are(original, tokenizer, file):
    texts = [WORDS[start:] + WORDS[:start] for start in range(9)]
    read = texts_of(original, tokenizer, file(*({"text": text} for text in texts)), 6)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [text.tokens for text in read.held_out] == ids[1::3] and {text.begin for text in read.held_out} == {1}
    assert read.calibration == [tokens for number, tokens in enumerate(ids) if number % 3 != 1]


def test_of_a_conversation_the_answer_counts(original, tokenizer, file):
    def conversation(start):
        answer = {"role": "assistant", "content": WORDS[1:]}
        return {"messages": [{"role": "user", "content": WORDS[start : start + 7]}, answer]}

    # The template ends with an "A" that asks for an answer, which is no beginning of the whole: all of it counts.
    read = texts_of(original, tokenizer, file(*map(conversation, range(3))), 2)
    assert [text.begin for text in read.held_out] == [1] and len(read.held_out[0].tokens) == 7 + len(WORDS)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    try:
        read = texts_of(original, tokenizer, file(*map(conversation, range(3))), 2)
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
    read = texts_of(original, tokenizer, file(*entries), 2)
    (held,) = read.held_out
    assert held.tokens[:4] == tokenizer("BCDA")["input_ids"] and held.begin == 4
    assert len(held.tokens) == 4 + ANSWER <= LENGTH
    assert [tokens[:4] for tokens in read.calibration] == [tokenizer(p + "A")["input_ids"] for p in ("ABC", "CDE")]


def test_one_prompt_is_on_one_side_alone(file):
    """Several answers to a prompt are no different texts."""
    answers = [
        {"messages": [{"role": "user", "content": "ABC"}, {"role": "assistant", "content": word}]} for word in WORDS
    ]
    reading = Reading(open_source(file(*answers, {"prompt": "ABC"}, {"prompt": "ABD"})))
    assert len(read_records(reading, 50)) == 2 and reading.left_out == len(WORDS)


BROKEN = {
    "no JSON": ["{"],
    "a number": ["3"],
    "nothing known": [{"question": "Why?"}],
    "an empty prompt": [{"prompt": " "}],
    "no turns": [{"turns": []}],
    "messages that are none": [{"messages": [{"role": "user"}]}],
}


@pytest.mark.parametrize("name", BROKEN)
def test_lines_that_are_none_are_left_out_and_named(file, name, capsys):
    assert [record.turns for record in read_records(Reading(open_source(file({"prompt": "ABC"}, *BROKEN[name]))), 2)]
    assert "1 of 2 records" in (said := capsys.readouterr().err) and "left out 1, in line 2: " in said
    sentence(lambda: read_records(Reading(open_source(file(*BROKEN[name]))), 2), "line 1", '{"prompt"')


def test_files_without_texts_are_refused(original, tokenizer, file, tmp_path):
    sentence(lambda: open_source(tmp_path / "none.jsonl"), "none.jsonl does not exist")
    sentence(lambda: texts_of(original, tokenizer, file({"text": WORDS}), 4), "1 texts", "two")
    sentence(lambda: texts_of(original, tokenizer, file({"text": "A"}, {"text": "B"}), 4), "0 texts", "two")
