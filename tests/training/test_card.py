"""Model cards and uploads: all from files, nothing interpreted, nothing uploaded that does not belong."""

import json
import pickle
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from paceline.spec import cli
from paceline.training.card import card, escaped, fenced, write_card

from support.models import fitted_heads

ROWS = {"chat": {"prompts": 2, "steps": 10, "tokens": 25, "tokens_per_step": 2.5}}
MEASURED = {"prompts": 2, "steps": 10, "tokens": 25, "tokens_per_step": 2.5, "nodes": 7, "depth": 3, "parents": [-1]}
ACCEPTANCE = {
    "p": [[0.625, 0.125], [0.5, 0.0]],
    "counts": {"hits": [[5, 1], [2, 0]], "trials": [[8, 8], [4, 4]]},
    "estimated": {"chain": {"depth": 2, "tokens_per_step": 1.9375}},
    "by_size": [{"nodes": 4, "tokens_per_step": 1.5}, {"nodes": 8, "tokens_per_step": 2.0}],
    "measured": MEASURED,
    "categories": ROWS,
    "how": {
        "counted": "teacher-forced", "command": "paceline evaluate x", "rule": "match", "temperature": 0.0,
        "max_new_tokens": 32, "dtype": "float32", "prompts": {"file": "p.jsonl", "sha256": "ab12", "in_training": 0},
    },
}  # fmt: skip
TRAINING = {
    "step": 1200,
    "tokens": 1234567,
    "config": {"run": {"folder": "runs/one"}, "objective": {"kind": "medusa"}},
    "versions": {"torch": "2.9"},
    "data": {
        "sources": {"own_text.jsonl": "cd34"}, "settings": {"length": 64},
        "counts": {"train": {"documents": 3, "tokens": 40, "loss_tokens": 20, "rows": 1}},
    },
    "figures": {"eval/loss": 1.25},
}  # fmt: skip


@pytest.fixture
def folder(target, tmp_path):
    """Heads with all that a card is made of."""
    path = tmp_path / "heads"
    fitted_heads(target, "hydra", steps=0).save(path)
    (path / "acceptance.json").write_text(json.dumps(ACCEPTANCE))
    (path / "training.json").write_text(json.dumps(TRAINING))
    (path / "prompts.sha256").write_text("00\n11\n")
    write_card(path)
    return path


def test_a_card_says_what_the_files_say(folder):
    text = (folder / "README.md").read_text()
    for line in (
        "| chat | 2 | 10 | 25 | 2.50 |", "| together | 2 | 10 | 25 | 2.50 |", "| 1 | 0.625 | 0.125 | - | 8 |",
        "| own\\_text.jsonl | cd34 |", "| train | 3 | 40 | 20 |", "1,234,567 tokens in 1,200 steps.", "eval/loss: 1.25",
        "0 are among the 2 in the training data", "paceline evaluate x", "chain 1.94 tokens per step",
        "1.50 with 4 nodes, 2.00 with 8 nodes.",
        "| mode | hydra |",        'paceline.load_drafter("heads", model)', "| heads | 3 |",
    ):  # fmt: skip
        assert line in text, line
    config = json.loads((folder / "config.json").read_text())
    assert config["paceline_target"]["fingerprint"] in text
    _, header, _ = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "paceline"
    assert str(folder) not in text


@pytest.mark.parametrize("absent", ["acceptance.json", "training.json", "prompts.sha256"])
def test_what_is_not_recorded_is_said_to_be_so(folder, absent):
    (folder / absent).unlink()
    said = {"acceptance.json": "not been measured", "training.json": "is not recorded"}
    assert said.get(absent, "# heads") in card(folder)


def test_names_from_elsewhere_are_shown_and_not_interpreted(folder):
    name = "a|b\n# <script>`*_[x](y)"
    found = {**ACCEPTANCE, "categories": {name: ROWS["chat"]}}
    (folder / "acceptance.json").write_text(json.dumps(found))
    assert "| a\\|b \\# \\<script\\>\\`\\*\\_\\[x\\](y) | 2 |" in card(folder)
    config = {**json.loads((folder / "config.json").read_text())}
    config["paceline_target"]["name"] = 'x"); import os #\n```'
    (folder / "config.json").write_text(json.dumps(config))
    assert 'load_target("x\\"); import os #\\n```")' in card(folder), "a string of Python's, whatever it holds"
    assert escaped("a\nb") == "a b" and fenced("```") == "````\n```\n````"


def test_damaged_files_are_named_in_a_sentence(folder):
    for name in ("acceptance.json", "training.json", "config.json"):
        kept = (folder / name).read_text()
        for text in ("[]", "{", '{"measured": 1}' if name == "acceptance.json" else "{"):
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=r"card of .* cannot be written"):
                write_card(folder)
        (folder / name).write_text(kept)
    assert "2.50" in (folder / "README.md").read_text(), "the old card stays"


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes everything and remembers it."""
    calls = SimpleNamespace(made=[], uploaded=[])

    class Api:
        def create_repo(self, name, **options):
            calls.made.append((name, options))

        def upload_folder(self, **options):
            calls.uploaded.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    calls.api = Api
    return calls


def test_push_uploads_what_belongs_and_nothing_else(folder, hub):
    (folder / "trainer").mkdir()
    (folder / "trainer" / "optimizer.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    assert cli.main(["push", str(folder), "someone/heads", "--private"]) == 0
    assert hub.made == [("someone/heads", {"private": True, "exist_ok": True, "repo_type": "model"})]
    (options,) = hub.uploaded
    names = ["README.md", "acceptance.json", "config.json", "model.safetensors", "prompts.sha256"]
    assert options["allow_patterns"] == [*names, "tokenizer.json", "training.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()],
        allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"],
    )  # fmt: skip
    assert sorted(kept) == sorted(options["allow_patterns"])


def spoil_pickle(folder):
    (folder / "trainer").mkdir()
    (folder / "trainer" / "state.pt").write_bytes(pickle.dumps({}))


def spoil_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_pickle, "state.pt, a pickle"),
        (spoil_config, "is no drafter folder"),
        (lambda folder: (folder / "README.md").unlink(), "no README.md"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: folder.rename(folder.with_name("away")), "is no folder"),
    ],
)
def test_push_refuses_what_is_no_drafter(folder, hub, capsys, spoil, words):
    spoil(folder)
    assert cli.main(["push", str(folder), "someone/heads"]) == 2
    assert words in capsys.readouterr().err and not hub.made and not hub.uploaded


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("no route"), "cannot be reached"),
        (HFValidationError("bad"), "write it as owner/name"),
    ],
)
def test_push_says_what_the_hub_said(folder, hub, capsys, monkeypatch, error, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(hub.api, "create_repo", fail)
    assert cli.main(["push", str(folder), "someone/heads"]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_push_without_a_token_is_a_sentence(folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert cli.main(["push", str(folder), "someone/heads"]) == 2
    assert "no access token" in capsys.readouterr().err and not hub.made
