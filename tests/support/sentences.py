"""Refusals in one sentence, and damage that leads to them."""

import pytest
from safetensors.torch import load_file, save_file


def sentence(call, *words):
    """What `call` is refused with: one sentence that holds the words."""
    with pytest.raises(ValueError) as caught:
        call()
    return one_sentence(caught.value, *words)


def one_sentence(error, *words):
    """What an error says, in one sentence that holds the words."""
    text = str(error)
    assert "\n" not in text and len(text) < 400 and all(word in text for word in words), text
    return text


def edit_tensors(change):
    """A function that lets `change` damage the tensors in a drafter folder."""

    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit
