"""What of a conversation is the target's own: by recorded tokens, by markers, by how the template writes it."""

import copy

import pytest
from paceline.spec.data.content import Unfit

from support.data_runs import PLAIN, learnt, read, talk

MARKED = "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' %}{% generation %}"
MARKED += "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}Z{% endfor %}"
MARKED += "{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture(scope="module")
def chat(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = PLAIN
    return made


def speaks(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["spans", "markers"])
def test_the_loss_is_on_what_the_target_says_and_its_end_of_turn(chat, template):
    own = copy.deepcopy(chat)
    own.chat_template = template
    (one,) = read(own, talk("ABC", "DEF", "GA", "ABC"))
    assert own.decode(one.tokens) == "uABC</s>ZaDEF</s>ZuGA</s>ZaABC</s>Z"
    assert learnt(own, one) == "DEF</s>ABC</s>"
    (cut,) = read(own, talk("ABC", "DEF", "GA", "ABC", finished=False))
    assert own.decode(cut.tokens) == "uABC</s>ZaDEF</s>ZuGA</s>ZaABC", "what was cut has no end of turn"
    assert learnt(own, cut) == "DEF</s>ABC"


def test_recorded_tokens_are_taken_as_they_are(chat):
    """Even where the text would be tokenized otherwise, and where an answer was cut."""
    odd = [chat.convert_tokens_to_ids(c) for c in "DEFF"]
    (one,) = read(chat, talk("ABC", "whatever", token_ids=[[*odd, 2]], finished=True))
    assert chat.decode(one.tokens) == "uABC</s>ZaDEFF</s>Z" and learnt(chat, one) == "DEFF</s>"
    (cut,) = read(chat, talk("ABC", "whatever", token_ids=[odd], finished=False))
    assert chat.decode(cut.tokens) == "uABC</s>ZaDEFF" and learnt(chat, cut) == "DEFF"
    (two,) = read(chat, talk("A", "B", "C", "D", token_ids=[[odd[0], 2], [odd[1]]], finished=False))
    assert chat.decode(two.tokens) == "uA</s>ZaD</s>ZuC</s>ZaE" and learnt(chat, two) == "D</s>E"


def test_smollm2_s_template_gives_the_answer_s_tokens(smollm2):
    _, own = smollm2
    record = talk("Hi, who are you?", "<|im_start|>? No.\n\n  Two  spaces.", "And?", "\nA line before.")
    (one,) = read(own, record, ends=frozenset([own.eos_token_id]))
    assert own.decode(one.tokens) == own.apply_chat_template(record["messages"], tokenize=False)
    assert "<|im_end|>" in learnt(own, one) and learnt(own, one).count("<|im_end|>") == 2
    assert learnt(own, one).startswith("<|im_start|>? No.") and "And?" not in learnt(own, one)
    for place in (1, 3):  # what precedes an answer is what decoding sees
        ids = own.apply_chat_template(record["messages"][:place], add_generation_prompt=True)["input_ids"]
        assert one.tokens[: len(ids)] == ids and one.loss[len(ids) - 1 : len(ids) + 1] == [0, 1]


def test_raw_text_is_learnt_whole(chat):
    one, bad, two = read(chat, {"text": "ABC"}, {"text": " \n"}, {"text": "D"})
    assert learnt(chat, one) == "ABC</s>" and learnt(chat, two) == "D</s>" and isinstance(bad, Unfit)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (talk("ABC"), "no answer to learn from"),
        ({"messages": "no"}, "is no list of messages"),
        ({"messages": [{"role": "assistant"}]}, "a message has no content"),
        (talk("A", "B", token_ids=[[3], [4]]), "one list of tokens for each answer"),
    ],
)
def test_records_that_make_no_document_are_named(chat, record, words):
    (found,) = read(chat, record)
    assert isinstance(found, Unfit) and words in str(found)
