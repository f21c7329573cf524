"""Drafters for a fine-tuned target that go on from drafters of its base model."""

import hashlib
import json
from pathlib import Path

import paceline
import pytest
import torch
from paceline.drafters.folder import target_identity
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaHeads
from paceline.training import train
from paceline.training.data.prompts import DIGESTS, read_digests, write_digests
from paceline.training.objectives.draft_lm import DraftObjective
from paceline.training.objectives.heads import MedusaObjective
from safetensors.torch import load_file

from support.models import fitted_heads, noisy_copy, tiny_llama
from support.sentences import sentence
from support.training_runs import random_rows, settings, write_data

pytestmark = pytest.mark.usefixtures("one_thread")
DRAFT = {"kind": "draft_lm", "layers": [1], "embeddings": "target", "head": "target", "known_tokens": 20}
DRAFT |= {"save": {"without_target_weights": True}}
HYDRA = {"kind": "medusa", "mode": "hydra", "heads": 3, "rank": 8}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A base model, its fine-tune as the target of runs, data, and drafters of the base model."""
    base = tiny_llama()
    tuned = noisy_copy(base, 0.05)
    for name, model in (("base", base), ("target", tuned)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base, _ = paceline.load_target(tmp_path / "base")
    write_data(tmp_path / "data", random_rows(12), random_rows(4, seed=1))
    rows = random_rows(8, seed=2)
    DraftObjective.build(DRAFT, base, rows).save(tmp_path / "draft")
    fitted_heads(base, "hydra", known=30).save(tmp_path / "hydra", dtype=torch.float32)
    write_digests(tmp_path / "draft" / DIGESTS, {"11" * 32})
    write_digests(tmp_path / "data" / DIGESTS, {"22" * 32})
    return tmp_path


@pytest.mark.parametrize("name", ["draft", "hydra"])
def test_a_drafter_of_the_base_model_is_where_training_begins(folder, name, capsys):
    start, tuned = folder / name, paceline.load_target(folder / "target")[0]
    sentence(lambda: paceline.load_drafter(start, tuned), "was made for target 'base'", "this target is 'target'")
    asked = {**(DRAFT if name == "draft" else HYDRA), "start": str(start)}
    kind = DraftObjective if name == "draft" else MedusaObjective
    capsys.readouterr()
    kind.build(asked, tuned, random_rows(2)).save(folder / "untrained")
    assert ("objective.layers have no effect" in capsys.readouterr().err) == (name == "draft")
    before, same = (load_file(where / "model.safetensors") for where in (start, folder / "untrained"))
    assert before.keys() == same.keys()
    assert all(torch.equal(before[key].to(same[key].dtype), same[key]) for key in before)

    config = settings(folder, objective=asked)
    assert train.run(config) is None
    made = Path(config.run.folder) / "best"
    about = json.loads((made / "config.json").read_text())
    digest = hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    base = json.loads((start / "config.json").read_text())["paceline_target"]
    assert about["paceline_start"] == {"name": name, "target": base, "sha256": digest}
    assert about["paceline_target"] == target_identity(tuned) != base
    assert f"| goes on from | {name}, made for base (SHA-256" in (made / "README.md").read_text()
    drafter = paceline.load_drafter(made, tuned)
    prompt = torch.tensor([[5, 9, 11, 4]])
    options = dict(do_sample=False, max_new_tokens=12)
    text = paceline.generate(tuned, prompt, **options)
    assert torch.equal(paceline.generate(tuned, prompt, drafter=drafter, **options), text)
    if name == "draft":
        assert torch.equal(
            drafter.vocabulary, paceline.load_drafter(start, paceline.load_target(folder / "base")[0]).vocabulary
        )
        assert read_digests(made) == {"11" * 32, "22" * 32}
    else:
        assert len(drafter.heads.vocabulary) == about["known_tokens"] == 30
        drafter.heads.save(folder / "again")
        assert json.loads((folder / "again" / "config.json").read_text())["paceline_start"] == about["paceline_start"]


def test_known_tokens_are_the_starts_unless_others_are_asked_for(folder):
    tuned, rows = paceline.load_target(folder / "target")[0], random_rows(3, seed=5)
    start = {**DRAFT, "start": str(folder / "draft")}
    kept, asked = (DraftObjective.build({**start, "known_tokens": number}, tuned, rows) for number in (None, 25))
    assert len(kept.known.ids) == 20 and len(asked.known.ids) == 25
    head = DraftObjective.build(
        {**start, "known_tokens": None, "head": "own", "embeddings": "own", "save": {}}, tuned, rows
    )
    assert head.known is None, "a head of its own learns all of them"


def test_a_start_of_another_shape_is_refused(folder):
    tuned = paceline.load_target(folder / "target")[0]
    draft, hydra = ({**asked, "start": str(folder / name)} for name, asked in (("draft", DRAFT), ("hydra", HYDRA)))
    wider = tiny_llama(hidden_size=64)
    sentence(lambda: DraftObjective.build(draft, wider), "[61, 32]", "[61, 64]", "same base model")
    sentence(lambda: DraftObjective.build(draft, tiny_llama(vocab=70)), "[61, 32]", "[70, 32]")
    whole = {"kind": "draft_lm", "start": str(folder / "base")}
    sentence(lambda: DraftObjective.build(whole, tiny_llama(vocab=70)), "start from a drafter for the same vocabulary")
    sentence(lambda: MedusaObjective.build(hydra, wider), "hidden_size 32", "is 64", "same base model")
    sentence(lambda: MedusaObjective.build(hydra, tiny_llama(vocab=70)), "vocab_size 61", "is 70")
    sentence(lambda: MedusaObjective.build({**hydra, "mode": "markov"}, tuned), "objective.mode is markov", "hydra")
    sentence(lambda: MedusaObjective.build({**hydra, "known_tokens": 40}, tuned), "known_tokens is 40", "30")
    sentence(lambda: MedusaObjective.build({**hydra, "start": str(folder / "draft")}, tuned), "holds no heads")
    sentence(lambda: MedusaObjective.build({**hydra, "start": str(folder / "base")}, tuned), "holds no heads")
    MedusaHeads.make(HeadSettings("hydra", heads=3, rank=8), tuned).save(folder / "all")
    assert not MedusaObjective.build({**hydra, "start": str(folder / "all")}, tuned).heads.trimmed


def test_a_recipe_needs_only_the_start_and_the_target(folder, capsys):
    """As in docs/train.md: a recipe that names layers, and overrides."""
    from paceline.spec import cli

    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"data: {{folder: {folder / 'data'}}}\nobjective: {json.dumps(DRAFT)}\nrun: {{folder: {folder / 'mine'}}}\n"
    )
    overrides = [f"objective.start={folder / 'draft'}", f"target.model={folder / 'target'}", "budget.tokens=900"]
    assert cli.main(["train", str(recipe), *overrides, "optimisation.batch=4"]) == 0
    assert (folder / "mine" / "best" / "known_tokens.safetensors").is_file()
