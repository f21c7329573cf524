"""Prompts in odd bytes, and tokenizers that lack what most have."""

import io
import json
import sys

import pytest
from paceline.spec import cli

from support.models import tiny_llama


@pytest.fixture
def bare(tmp_path, tokenizer):
    """A model whose tokenizer gives no attention mask and has no token to pad with."""
    tiny_llama(max_position_embeddings=512, eos_token_id=2).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    path = tmp_path / "bare" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "pad_token"}))
    return tmp_path / "bare"


def command(*arguments):
    try:
        return cli.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code


ODD = {"latin": b"a \xff b", "cut": "é".encode()[:1], "utf-16": "AB".encode("utf-16")}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_bytes_that_are_no_text_are_refused_in_a_sentence(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_bytes(content)
    for file, name in (("-", "standard input"), (tmp_path / "p.txt", tmp_path / "p.txt")):
        without_locale = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", without_locale)
        assert command("generate", "--prompt-file", file) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"paceline: {name} is ") and "text in UTF-8" in told and told.count("\n") == 1
    for option in ("--prompt", "--chat"):  # as Python decodes arguments
        assert command("generate", option, content.decode("ascii", "surrogateescape")) == 2
        assert "the prompt is no text in UTF-8" in capsys.readouterr().err


def test_text_is_read_as_utf8_whatever_the_locale(bare, tmp_path, monkeypatch, capsys):
    """A byte order mark is no part of the text; what the terminal cannot show does not end the command."""
    texts = []
    for content in (b"AB", b"\xef\xbb\xbfAB"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
        assert command("generate", "--model", bare, "--prompt-file", "-", "--max-new-tokens", 5, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.spec.cli.commands.models", lambda args: print("→ über"))
        assert command("models") == 0
    narrow.flush()
    assert narrow.buffer.getvalue() == b"? ?ber\n"


def test_a_tokenizer_without_mask_and_padding_does_everything(bare, tmp_path, capsys, tokenizer):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ABC", "ABCAB", "QR")))
    small = "--model", bare, "--max-new-tokens", 5
    for option in ("--prompt", "--chat"):
        assert command("generate", *small, option, "ABCAB", "--json") == 0
        assert len(json.loads(capsys.readouterr().out)["tokens"]) <= 5
    assert command("data", "generate", prompts, *small, "--compare-transformers", "--temperatures", "0") == 0
    assert "3 prompts, batch 16" in capsys.readouterr().out
    assert command("bench", prompts, "-o", tmp_path / "run.jsonl", *small, "--batch", 2) == 0
    assert "identical" in capsys.readouterr().out


def test_a_folder_of_a_tokenizer_alone_prepares_data(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "words")
    assert not (tmp_path / "words" / "config.json").exists()
    (tmp_path / "t.txt").write_text("ABCABCAB")
    options = "-o", tmp_path / "data", "--length", 8, "--held-out", 0
    assert command("data", "prepare", tmp_path / "t.txt", "--tokenizer", tmp_path / "words", *options) == 0
    assert "8 tokens" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert command("data", "prepare", tmp_path / "t.txt", "--tokenizer", tmp_path / "empty", *options) == 2
    assert "the tokenizer of" in capsys.readouterr().err
