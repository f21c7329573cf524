"""SmolLM2's own GGUF file: the model in blocks is the model that transformers dequantises.

Which transformers has done once, in bfloat16, where the model was fetched; every bit of float32 is compared on small
files, in test_gguf_targets.py.
"""

import json

import paceline
import pytest
import torch
from paceline.spec.target.weights import dense_state, stored_bytes, weights_form
from torch.func import functional_call

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
TEXTS, LENGTH = 4, 125  # 500 positions


@pytest.fixture(scope="module")
def loaded(smollm2):
    """The model in blocks, in float32, its numbers and its tokenizer."""
    blocks, tokenizer = paceline.load_target("smollm2-135m", torch.float32, weights="q4")
    return blocks, dense_state(blocks), tokenizer


@torch.no_grad()
def test_every_token_is_that_of_the_dequantised_model(loaded, smollm2, root):
    blocks, numbers, tokenizer = loaded
    lines = (root / "tests" / "spec_bench_24.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines for turn in json.loads(line)["turns"] for token in tokenizer(turn)["input_ids"]]
    ids = torch.tensor(ids[: TEXTS * LENGTH]).view(TEXTS, LENGTH)
    mine, theirs = blocks(ids).logits, functional_call(smollm2[0], numbers, (ids,), tie_weights=False).logits
    assert (mine.argmax(-1) == theirs.argmax(-1)).float().mean() == 1.0
    divergence = (theirs.softmax(-1) * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum(-1)
    assert divergence.max() < 1e-5 and (mine - theirs).abs().max() < 1e-2


def test_every_number_is_that_of_the_dequantised_model(loaded, smollm2):
    blocks, mine, _ = loaded
    theirs = smollm2[0].state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].bfloat16().float(), theirs[name]) for name in theirs)
    assert weights_form(blocks) == "210 of 4 bits by 32, 1 of 8 bits by 32"
    blocks_alone = stored_bytes(blocks) - sum(parameter.nbytes for parameter in blocks.parameters())
    assert 96e6 < blocks_alone < 150e6, "at least 5 bits a weight in the layers, and 8.5 in the head"


def test_the_tokenizer_is_that_of_the_converted_model(loaded, smollm2):
    tokenizer, converted = loaded[2], smollm2[1]
    assert tokenizer.get_vocab() == converted.get_vocab() and tokenizer.chat_template == converted.chat_template
    text = "Why is the sky blue?\n  def f(x): return 3.14 * x — naïve"
    assert tokenizer(text)["input_ids"] == converted(text)["input_ids"]
    assert tokenizer.eos_token == converted.eos_token
