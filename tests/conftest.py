"""Fixtures: tiny random models that run in milliseconds, and SmolLM2 where it can be fetched."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(2)
settings.register_profile("paceline", deadline=None, derandomize=True)
settings.load_profile("paceline")


def tiny_llama(vocab=61, seed=0, **options):
    """A random Llama of two layers in float32; `pad` is token 0, there is no end of text by default."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def noisy_copy(model, noise=0.02, seed=1):
    """A draft model that mostly agrees with `model`."""
    torch.manual_seed(seed)
    copy = type(model)(model.config).eval()
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters()):
            mine.copy_(theirs + noise * torch.randn_like(theirs))
    return copy


@pytest.fixture(scope="session")
def target():
    return tiny_llama()


@pytest.fixture(scope="session")
def draft(target):
    from paceline.drafters.draft_model import ModelDrafter

    return ModelDrafter(noisy_copy(target))


@pytest.fixture(scope="session")
def ragged():
    """Three prompts of different length, padded on the left: (input_ids, attention_mask)."""
    torch.manual_seed(7)
    ids = torch.randint(1, 61, (3, 9))
    ids[0, 5:] = ids[0, 1:5]  # something for prompt lookup to find
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :8] = 0
    return ids * mask, mask


@pytest.fixture(scope="session")
def tokenizer():
    """61 one-letter words, "a" to "Z" and beyond, spoken without spaces, with a small chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(0x41, 0x41 + 58)]
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}A"
    return made


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 with its tokenizer; skips where it cannot be fetched."""
    import paceline

    try:
        return paceline.load_target("smollm2-135m", dtype=torch.float32)
    except ValueError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def root():
    return Path(__file__).resolve().parent.parent
