"""Text as its tokens come, against decoding them all and cutting then."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paceline.spec.serve.running_text import RunningText
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, some pairs of them, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [("a", "b"), ("c", "d"), ("Ã", "¤")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


TEXTS = st.text(alphabet="abcdä€😀 \n", max_size=12)


@given(TEXTS, st.lists(st.text(alphabet="abcdä😀 ", min_size=1, max_size=4), max_size=3), st.data())
def test_it_is_the_whole_text_cut_at_the_first_stop(tokenizer, text, stops, data):
    tokens = tokenizer(text)["input_ids"]
    if data.draw(st.booleans()):
        tokens.insert(data.draw(st.integers(0, len(tokens))), tokenizer.eos_token_id)
    running, shown = RunningText(tokenizer, stops), ""
    for count, token in enumerate(tokens, 1):
        stopped = running.put(token)
        assert running.shown.startswith(shown), "what was shown is never taken back"
        shown = running.shown
        whole = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        starts = [whole.find(stop) for stop in stops if stop in whole]
        assert stopped == bool(starts), "it stops at the token that completes a stop"
        if starts:
            assert running.text == running.shown == whole[: min(starts)]
            return
    running.end()
    assert running.text == whole if tokens else running.text == ""


@given(st.lists(st.integers(0, 255), max_size=9))
def test_bytes_that_are_no_text_are_told_at_the_end(tokenizer, tokens):
    running = RunningText(tokenizer)
    for token in tokens:
        running.put(token)
    running.end()
    assert running.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_beginning_of_a_stop_is_held_back(tokenizer):
    running, seen = RunningText(tokenizer, ("abca", "bd")), []
    for letter in "zabcxabb":
        running.put(tokenizer.convert_tokens_to_ids(letter))
        seen.append(running.shown)
    assert seen == ["z", "z", "z", "z", "zabcx", "zabcx", "zabcx", "zabcxab"]
    running.end()
    assert running.text == "zabcxabb"
