"""Drafter folders: what is saved is what is loaded, and nothing else is taken."""

import json
import pickle

import paceline
import pytest
import torch
from paceline.drafters.folder import target_fingerprint
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaDrafter, MedusaHeads
from paceline.training.objectives.heads import MedusaObjective
from safetensors.torch import load_file

from support.models import fitted_heads, noisy_copy, tiny_llama
from support.sentences import edit_tensors

MODES = ["independent", "markov", "hydra"]


@pytest.fixture
def saved(target, tmp_path):
    """A folder of trimmed Hydra heads."""
    heads = MedusaHeads.make(HeadSettings("hydra", heads=2), target, torch.arange(3, 43))
    heads.save(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [None, 40])
def test_a_saved_drafter_drafts_the_same(target, ragged, tmp_path, mode, known):
    heads = fitted_heads(target, mode, steps=5, known=known, blocks=2, own_heads=known is None)
    heads.save(tmp_path / "heads", dtype=torch.float32)
    assert sorted(file.name for file in (tmp_path / "heads").iterdir()) == ["config.json", "model.safetensors"]
    options = dict(do_sample=True, top_k=0, seed=0, max_new_tokens=16, return_dict_in_generate=True)
    runs = [
        paceline.generate(target, *ragged, drafter=drafter, tree="3x2", **options)
        for drafter in (MedusaDrafter(heads), paceline.load_drafter(tmp_path / "heads", target), tmp_path / "heads")
    ]
    drafted = [[event.tokens for event in run.trace.events] for run in runs]
    assert drafted[0] == drafted[1] == drafted[2]


def test_an_untrained_objective_is_a_drafter_that_decodes_losslessly(target, ragged, tmp_path):
    truth = target.generate(ragged[0], attention_mask=ragged[1], do_sample=False, max_new_tokens=12)
    for mode in MODES:
        MedusaObjective(MedusaHeads.make(HeadSettings(mode), target)).save(tmp_path / mode)
        drafter = paceline.load_drafter(tmp_path / mode, target)
        assert drafter.name == mode and drafter.heads.head_weight.data_ptr() == target.lm_head.weight.data_ptr()
        got = paceline.generate(target, *ragged, drafter=drafter, do_sample=False, max_new_tokens=12)
        assert torch.equal(got, truth)


def test_the_fingerprint_knows_a_model_by_its_weights_in_either_precision():
    model = tiny_llama()
    mine = target_fingerprint(model)
    assert mine == target_fingerprint(tiny_llama().to(torch.bfloat16)) == target_fingerprint(tiny_llama())
    assert mine != target_fingerprint(tiny_llama(seed=1)) and mine != target_fingerprint(
        tiny_llama(num_hidden_layers=1)
    )
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.1
    assert mine != target_fingerprint(model)


def test_the_config_tells_kind_target_and_sizes_and_no_path(target, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["paceline_drafter"] == "medusa" and config["paceline_format"] == 1
    assert config["paceline_target"]["fingerprint"] == target_fingerprint(target)
    assert (config["mode"], config["heads"], config["known_tokens"], config["vocab_size"]) == ("hydra", 2, 40, 61)
    assert str(saved.parent) not in (saved / "config.json").read_text()
    tensors = load_file(saved / "model.safetensors")
    assert tensors["weight"].dtype == torch.bfloat16 and tensors["vocabulary"].tolist() == list(range(3, 43))


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def as_pickle(name):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps({"weight": 1}))

    return edit


def cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_mode(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["mode"]
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "bin": (
        as_pickle("pytorch_model.bin"),
        r"pytorch_model.bin, a pickle, .* paceline convert .*/pytorch_model.bin -o FOLDER",
    ),
    "pt": (as_pickle("medusa_lm_head.pt"), "medusa_lm_head.pt, a pickle"),
    "ckpt": (as_pickle("last.ckpt"), "last.ckpt, a pickle"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors and so no weights"),
    "cut off": (cut_off, "cannot be read"),
    "missing": (edit_tensors(lambda tensors: tensors.pop("path_weight")), "lacks the tensor 'path_weight'"),
    "unexpected": (edit_tensors(lambda tensors: tensors.update(extra=torch.ones(1))), "has a tensor 'extra'"),
    "shape": (edit_tensors(lambda tensors: tensors.update(bias=torch.ones(1))), r"'bias' has shape \[1\]"),
    "nan": (edit_tensors(lambda tensors: tensors["bias"].fill_(torch.nan)), "'bias' holds NaN"),
    "no ids": (edit_tensors(lambda tensors: tensors.pop("vocabulary")), "lacks the list of its 40 tokens"),
    "ids": (edit_tensors(lambda tensors: tensors["vocabulary"].fill_(3)), "ascending token ids"),
    "mode": (edit_config(mode="eagle"), "mode='eagle' is not a kind of heads"),
    "setting": (without_mode, "lacks 'mode'"),
    "later format": (edit_config(paceline_format=2), "has format 2 and this version knows 1"),
    "no number": (edit_config(paceline_format="2"), "is damaged; fetch or train it again"),
    "target": (edit_config(paceline_target={"name": "tiny"}), "is damaged; fetch or train it again"),
    "kind": (edit_config(paceline_drafter="oracle"), "is of a kind 'oracle'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_a_sentence(target, saved, case):
    breaks, words = BROKEN[case]
    breaks(saved)
    with pytest.raises(ValueError, match=words) as caught:
        paceline.load_drafter(saved, target)
    assert "\n" not in str(caught.value)


def test_a_drafter_of_another_target_is_refused_naming_both(saved, tmp_path):
    other = tiny_llama(seed=1)
    other.save_pretrained(tmp_path / "other")
    other, _ = paceline.load_target(tmp_path / "other", with_tokenizer=False)
    with pytest.raises(ValueError, match=r"was made for target 'LlamaForCausalLM' .* this target is 'other'"):
        paceline.load_drafter(saved, other)


def test_a_pickle_by_its_name_is_refused(target, tmp_path):
    (tmp_path / "heads.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(
        ValueError, match=r"heads.pt is a pickle, which can run code; make a folder of it by paceline convert"
    ):
        paceline.load_drafter(tmp_path / "heads.pt", target)


def test_a_draft_model_folder_may_name_its_target(target, tmp_path):
    draft = noisy_copy(target)
    draft.save_pretrained(tmp_path / "draft")
    edit = edit_config(paceline_drafter="draft_lm", paceline_target={"name": "x", "fingerprint": "0" * 64})
    edit(tmp_path / "draft")
    with pytest.raises(ValueError, match="was made for target 'x'"):
        paceline.load_drafter(tmp_path / "draft", target)
    mine = {"name": "x", "fingerprint": target_fingerprint(target)}
    edit_config(paceline_target=mine)(tmp_path / "draft")
    assert paceline.load_drafter(tmp_path / "draft", target).name == "draft"


def test_the_default_tree_follows_the_measured_acceptance(target, saved):
    (saved / "acceptance.json").write_text(json.dumps({"p": [[0.9, 0.01], [0.9, 0.01]]}))
    narrow = paceline.load_drafter(saved, target).default_shape
    (saved / "acceptance.json").write_text(json.dumps({"p": [[0.2] * 3, [0.01]]}))
    wide = paceline.load_drafter(saved, target).default_shape
    assert narrow.max_depth == 2 and len(wide.children[0]) == 3
    (saved / "acceptance.json").write_text("[]")
    with pytest.raises(ValueError, match="is no record of acceptance"):
        paceline.load_drafter(saved, target)


def test_a_hub_id_is_fetched_without_pickles(target, saved, monkeypatch):
    import huggingface_hub
    from transformers import PreTrainedConfig

    asked = []
    config = json.loads((saved / "config.json").read_text())
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: (config, {}))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(saved)
    )
    assert paceline.load_drafter("someone/heads", target).name == "heads"
    assert asked == [("someone/heads", {"allow_patterns": ["*.json", "*.safetensors", "*.md"]})]
