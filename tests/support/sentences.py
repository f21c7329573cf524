"""Refusals in one sentence."""

import pytest


def sentence(call, *words):
    """What `call` is refused with: one sentence that holds the words."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and all(word in text for word in words), text
    return text
