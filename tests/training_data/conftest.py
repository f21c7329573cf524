"""A tiny target that chats."""

import pytest

from support.data_runs import ENDS, TEMPLATE
from support.models import tiny_llama


@pytest.fixture(scope="module")
def chat(tokenizer):
    """The letters' tokenizer with a template that marks turns by a letter: "uABC</s>aXYZ</s>"."""
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    made.eos_token = "</s>"
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_llama(max_position_embeddings=128, seed=4)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(path)
    chat.save_pretrained(path)
    return str(path)
