"""Tokenizers of two kinds, trained in a moment."""

import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (Path(__file__).resolve().parents[1] / "spec_bench_24.jsonl").read_text(encoding="utf-8").splitlines()


@cache
def byte_level(tokens=400, begin="<|start|>", end="<|end|>"):
    """A byte-level BPE like GPT-2's. One of fewer tokens is the beginning of one of more."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXT[::2], trainers.BpeTrainer(vocab_size=tokens, special_tokens=[begin, end], initial_alphabet=letters)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end)


@cache
def sentence_piece(tokens=520):
    """A BPE like Llama 2's: spaces are part of words, and bytes stand for characters that it does not know."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(TEXT[1::2], trainers.BpeTrainer(vocab_size=tokens - 259, limit_alphabet=60))
    learned = json.loads(core.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    core.model = models.BPE(
        {token: index for index, token in enumerate(vocab)}, [tuple(pair) for pair in learned["merges"]],
        byte_fallback=True, unk_token="<unk>", fuse_unk=True,
    )  # fmt: skip
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizers():
    return {"bytes": byte_level(), "fewer bytes": byte_level(360), "pieces": sentence_piece()}
