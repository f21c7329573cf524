"""What of a conversation is the target's own: by recorded tokens, by markers, by how the template writes it."""

import copy

import pytest
from paceline.spec.data.content import Unfit

from support.data_runs import PLAIN, learnt, learnt_parts, read, talk

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


# Markers.

FIRST = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
LAST = "{% else %}u{{ m['content'] }}{% endif %}{% endfor %}"
ASK = "{% if add_generation_prompt %}a{% endif %}"
MARKERS = {
    # name: template, and what is learnt of A, B, C, D
    "to the end of the message": (FIRST + "{% generation %}{{ m['content'] }}{% endgeneration %}" + LAST, ["B", "D"]),
    "with the words that ask": (
        FIRST + "{% generation %}a{{ m['content'] }}Z{% endgeneration %}" + LAST + ASK,
        ["BZ", "DZ"],
    ),
    "the content alone": (
        FIRST + "a{%- generation -%}{{ m['content'] }}{%- endgeneration -%}Z" + LAST + ASK,
        ["B", "D"],
    ),
    "in a block that is written later": (
        FIRST + "{% set x %}a{% generation %}{{ m['content'] }}Z{% endgeneration %}{% endset %}{{ x }}" + LAST + ASK,
        ["BZ", "DZ"],
    ),
    "in a comment": ("{# {% generation %} #}" + FIRST + "a{{ m['content'] }}Z" + LAST + ASK, ["BZ", "DZ"]),
    "on what is not said": (
        FIRST + "a{{ m['content'] }}{% generation %}Z{% endgeneration %}" + LAST + ASK,
        ["BZ", "DZ"],
    ),
}


@pytest.mark.parametrize("name", MARKERS)
def test_markers_are_held_against_the_text(chat, name):
    template, parts = MARKERS[name]
    tokenizer = speaks(chat, template)
    (one,) = read(tokenizer, talk("A", "B", "C", "D"))
    assert learnt_parts(tokenizer, one) == parts
    whole = tokenizer.apply_chat_template(talk("A", "B", "C", "D")["messages"], tokenize=False)
    assert tokenizer.decode(one.tokens) == whole


def test_a_span_that_ends_in_what_has_no_token_does_not_run_on():
    """White space at its end that the tokenizer drops: the user's next turn is not learnt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "why", "so", "and", "then", "user", "bot"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}user {{ m['content'] }} {% else %}bot {% generation %}"
        "{{ m['content'] }}  \n{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}bot {% endif %}"
    )
    (one,) = read(tokenizer, talk("why", "so", "and", "then"))
    assert tokenizer.convert_ids_to_tokens(one.tokens) == ["user", "why", "bot", "so", "user", "and", "bot", "then"]
    assert one.loss == [0, 0, 0, 1, 0, 0, 0, 1]


def test_named_templates_are_chosen_from_as_transformers_does(chat):
    tokenizer = speaks(chat, {"default": PLAIN, "tool_use": "T" + MARKED})
    (plain,) = read(tokenizer, talk("A", "B"))
    (tools,) = read(tokenizer, talk("A", "B", tools=[{"type": "function", "function": {"name": "f"}}]))
    assert tokenizer.decode(plain.tokens) == "uA</s>ZaB</s>Z" and learnt(tokenizer, plain) == "B</s>"
    assert tokenizer.decode(tools.tokens) == "TuA</s>ZaB</s>Z" and learnt(tokenizer, tools) == "B</s>"
    (odd,) = read(speaks(chat, {"rag": PLAIN}), talk("A", "B"))
    assert isinstance(odd, Unfit) and "no default" in str(odd)


def test_a_message_without_content_is_rendered_with_its_calls(chat):
    template = PLAIN.replace("</s>", "{% for c in m.tool_calls %}[{{ c.function.arguments.a }}]{% endfor %}</s>", 1)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "X"}'}}],
    }
    messages = [
        {"role": "user", "content": "A"},
        call,
        {"role": "tool", "content": "B"},
        *talk("C", "D")["messages"][1:],
    ]
    (one,) = read(speaks(chat, template), {"messages": messages})
    assert chat.decode(one.tokens) == "uA</s>Za[X]</s>ZtB</s>ZaD</s>Z" and learnt(chat, one) == "[X]</s>D</s>"
    (one,) = read(chat, {"messages": messages})
    assert chat.decode(one.tokens) == "uA</s>Za</s>ZtB</s>ZaD</s>Z" and learnt(chat, one) == "D</s>", (
        "not to say nothing"
    )


# Templates that write earlier turns otherwise than at first.

TURNS = talk("A", "T`B", "C", "T`D")
REWRITING = {
    # name: template, and of each answer what is before it, and what is learnt of it
    "thinking is dropped": (
        "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ m['content'].split('`')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}" + ASK,
        [("uA</s>a", "T`B</s>"), ("uA</s>aB</s>uC</s>a", "T`D</s>")],
    ),
    "an end at the very end": (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}a{% else %}</s>{% endif %}",
        [("uAa", "T`B</s>"), ("uAaT`BuCa", "T`D</s>")],
    ),
    "a count in front": (
        "{{ 'NM'[messages|length % 2] }}" + PLAIN,
        [("MuA</s>Za", "T`B</s>"), ("MuA</s>ZaT`B</s>ZuC</s>Za", "T`D</s>")],
    ),
    "thinking is asked for and not written": (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'].split('`')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}aT{% endif %}",
        [("uA</s>aT", "T`B</s>"), ("uA</s>aB</s>uC</s>aT", "T`D</s>")],
    ),
    "what is asked with is not written": (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}aX{% endif %}",
        [("uA</s>a", "T`B</s>"), ("uA</s>aT`B</s>uC</s>a", "T`D</s>")],
    ),
}


@pytest.mark.parametrize("name", REWRITING)
def test_a_template_that_rewrites_gives_a_document_for_each_answer(chat, name):
    template, truth = REWRITING[name]
    tokenizer = speaks(chat, template)
    documents = read(tokenizer, TURNS)
    for document, (before, answer) in zip(documents, truth, strict=True):
        text = tokenizer.decode(document.tokens)
        assert text.startswith(before + answer) and learnt(tokenizer, document) == answer
        assert document.loss[: len(tokenizer(before)["input_ids"])] == [0] * len(tokenizer(before)["input_ids"])
    assert {(document.key, document.turns) for document in documents} == {('["A", "C"]', ("A", "C"))}


@pytest.mark.parametrize("name", REWRITING)
def test_recorded_answers_are_behind_what_decoding_saw(chat, name):
    tokenizer = speaks(chat, REWRITING[name][0])
    recorded = [tokenizer("XY</s>")["input_ids"], tokenizer("YX")["input_ids"]]
    documents = read(tokenizer, {**TURNS, "token_ids": recorded, "finished": False})
    for document, tokens, stop in zip(documents, recorded, (1, 3), strict=True):
        asked = tokenizer.apply_chat_template(TURNS["messages"][:stop], add_generation_prompt=True)["input_ids"]
        assert document.tokens == [*asked, *tokens] and document.loss == [0] * len(asked) + [1] * len(tokens)


def test_a_clock_in_the_template_loses_nothing(chat, monkeypatch):
    ticks = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 9)

    class Clock:
        @staticmethod
        def now():
            return Clock()

        def strftime(self, form):
            return next(ticks)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer = speaks(chat, "{{ strftime_now('%f') }}" + PLAIN + "{# its own #}")
    documents = read(tokenizer, talk("A", "B", "C", "D"))
    assert [learnt(tokenizer, document) for document in documents] == ["B</s>", "D</s>"]
    assert [tokenizer.decode(document.tokens)[1:] for document in documents] == [
        "uA</s>ZaB</s>Z",
        "uA</s>ZaB</s>ZuC</s>ZaD</s>Z",
    ]


def test_an_answer_that_is_not_written_is_named(chat):
    tokenizer = speaks(
        chat, "{{ messages|length }}" + PLAIN.replace("m['content']", "m['content']|reverse|list|length")
    )
    (odd,) = read(tokenizer, talk("A", "B"))
    assert isinstance(odd, Unfit) and "does not write an answer as it is" in str(odd)


# Models that do not chat, and ids.


def test_a_completion_is_learnt_behind_its_prompt_where_there_is_no_template(chat):
    bare = speaks(chat, None)
    (one,) = read(bare, {"prompt": "ABC", "completion": "DE"})
    assert bare.decode(one.tokens) == "ABCDE</s>" and learnt(bare, one) == "DE</s>"
    (two,) = read(chat, {"prompt": "ABC", "completion": "DE"})
    assert chat.decode(two.tokens) == "uABC</s>ZaDE</s>Z" and learnt(chat, two) == "DE</s>"
    with pytest.raises(ValueError, match="no chat template and the data has conversations"):
        read(bare, talk("A", "B"))


def test_ids_beyond_the_vocabulary_are_left_out(chat):
    good, far, odd = read(
        chat, talk("A", "B"), talk("A", "B", token_ids=[[1_000_000_000]]), {"text": "ABz"}, vocabulary=len(chat) - 1
    )
    assert good.tokens and all(isinstance(one, Unfit) and "vocabulary of 60" in str(one) for one in (far, odd))
