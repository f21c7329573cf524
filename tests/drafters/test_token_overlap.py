"""Which tokens two tokenizers have in common, against their own decoders; and as what the others are read."""

import pytest
import torch
from paceline.drafters.token_overlap import SAMPLE, shared_tokens

PAIRS = [("bytes", "pieces"), ("pieces", "bytes"), ("bytes", "fewer bytes"), ("fewer bytes", "bytes")]


def text_of(tokenizer, token):
    """What a token says inside of a text, None where that is part of a character."""
    around = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode([*around, token], clean_up_tokenization_spaces=False)
    return None if "�" in text else text.removeprefix("a")


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_tokens_in_common_say_the_same(tokenizers, one, other):
    target, draft = tokenizers[one], tokenizers[other]
    shared = shared_tokens(target, draft, len(target) + 5, len(draft))
    assert len(shared.ids) > 300 and (shared.ids.diff() > 0).all() and len(shared.rows) == len(shared.ids)
    assert shared.ids.max() < len(target) == shared.of and shared.rows.max() < len(draft), "padding is no token"
    assert len(shared.rows.unique()) == len(shared.rows)
    for token, row in zip(shared.ids.tolist(), shared.rows.tolist()):
        if token in target.all_special_ids:
            continue
        text, same = text_of(target, token), text_of(draft, row)
        assert text == same or text is None or same is None, (text, same)
    assert torch.equal(shared.reads[shared.ids], shared.rows)
    assert shared.agree == (one in other or other in one) == torch.equal(shared.ids, shared.rows)
    known = [token in set(shared.ids.tolist()) for token in target(SAMPLE, add_special_tokens=False)["input_ids"]]
    assert (
        shared.share_of(target) == sum(known) / len(known)
        and shared.share_of(target, "") == len(shared.ids) / shared.of
    )


def test_ends_of_a_text_are_the_same_whatever_they_are_called(tokenizers):
    target, draft = tokenizers["bytes"], tokenizers["pieces"]
    shared = shared_tokens(target, draft, 400, 520)
    pairs = dict(zip(shared.ids.tolist(), shared.rows.tolist()))
    assert target.eos_token != draft.eos_token
    assert pairs[target.eos_token_id] == draft.eos_token_id and pairs[target.bos_token_id] == draft.bos_token_id


def test_a_token_that_the_draft_lacks_is_read_as_its_last_piece(tokenizers):
    target, draft = tokenizers["bytes"], tokenizers["fewer bytes"]
    shared = shared_tokens(target, draft, 410, 380)
    lacking = sorted({*range(len(target))} - {*shared.ids.tolist()})
    assert len(lacking) == 40
    words = {token: text for token in lacking if (text := text_of(target, token)) is not None}
    assert len(words) > 30
    for token, text in words.items():
        pieces = draft(text, add_special_tokens=False)["input_ids"]
        assert len(pieces) > 1 and shared.reads[token] == pieces[-1]
    assert (shared.reads[400:] == draft.eos_token_id).all(), "of padding there is nothing to read"
    assert torch.equal(shared.reads[: len(draft)], torch.arange(len(draft)))


def test_a_part_of_a_character_is_read_as_its_last_byte(tokenizers):
    target, draft = tokenizers["bytes"], tokenizers["pieces"]
    shared = shared_tokens(target, draft, 400, 520)
    first_of_two = target.convert_tokens_to_ids("Ã")  # the byte 0xC3, with which é begins
    assert draft.convert_ids_to_tokens(int(shared.reads[first_of_two])) == "<0xC3>"
    assert draft.convert_ids_to_tokens(int(shared.reads[target.convert_tokens_to_ids("Ġ")])) == "▁"
    letter = draft.convert_tokens_to_ids("e")
    assert shared.reads[target.convert_tokens_to_ids("e")] == letter != draft.convert_tokens_to_ids("<0x65>")
