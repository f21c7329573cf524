"""Where published drafters are: folders of one file, of shards, beside others' files and pickles, and the model hub."""

import json
import pickle
from pathlib import Path

import huggingface_hub
import paceline
import pytest
import torch
from formats.published import V, config_of, eagle1, eagle3, medusa, norm, write
from paceline.drafters.formats.checkpoint import open_checkpoints
from paceline.drafters.formats.detect import detect
from paceline.drafters.formats.eagle_names import known_ids, network_name, offsets_of, published_name, without_prefixes
from paceline.drafters.kept import kept_drafter
from paceline.drafters.known_tokens import places
from safetensors.torch import load_file, save_file

from support.models import noisy_copy
from support.sentences import sentence

LAYER = {
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight",
}  # fmt: skip
# The lists of engines and of the reference, as in the files of EAGLE-Llama-3 and EAGLE3-Llama-3.1-8B.
GOLDEN_1 = {"fc.weight", *(f"layers.0.{name}" for name in LAYER)}
GOLDEN_3 = {
    "fc.weight", "norm.weight", "lm_head.weight", "d2t",
    "layers.0.input_layernorm.weight", "layers.0.hidden_norm.weight", *(f"layers.0.{name}" for name in LAYER),
}  # fmt: skip
RIGHT = {"eagle_aux_hidden_state_layer_ids": [2, 4, 7], "norm_before_residual": True, "rope_theta": 100.0}


def test_the_table_of_names_is_read_both_ways(learned):
    assert set(learned.tensors) == GOLDEN_3 | {"t2d"}
    for golden, wide in ((GOLDEN_1, False), (GOLDEN_3, True)):
        ours = {name: network_name(name, wide) for name in golden}
        assert None not in ours.values() and len(set(ours.values())) == len(golden)
        assert all(published_name(inner, wide) == name for name, inner in ours.items())
    assert {network_name(name, True) for name in GOLDEN_3} == set(learned.network.stored())
    assert network_name("midlayer.hidden_norm.weight", True) == "layers.0.hidden_norm.weight"
    assert [network_name(f"aux_norm_{name}.weight", True) for name in ("low", "mid", "high")] == [
        f"tap_norms.{number}.weight" for number in range(3)
    ]
    assert network_name("anything", True) is network_name("layers.0.mlp.experts.weight", True) is None
    assert without_prefixes(["model.fc.weight", "module.draft_model.norm.weight", "d2t"]) == {
        "fc.weight": "model.fc.weight", "norm.weight": "module.draft_model.norm.weight", "d2t": "d2t",
    }  # fmt: skip
    sentence(lambda: published_name("embedding_norm.weight", False), "no published EAGLE layout has a tensor like")


def test_vocabularies_are_offsets():
    ids = torch.tensor([0, 3, 4, 60])
    lists = offsets_of(ids, V)
    assert lists["d2t"].tolist() == [0, 2, 2, 57] and lists["d2t"].dtype == torch.int64
    assert lists["t2d"].dtype == torch.bool and lists["t2d"].nonzero()[:, 0].tolist() == ids.tolist()
    assert torch.equal(known_ids(lists["d2t"]), ids) and places(ids, V)[60] == 3


def test_formats_are_told_by_their_keys():
    assert detect({}, eagle1()) == detect({}, eagle1("model.")) == detect({}, eagle3("midlayer.")) == "EAGLE"
    assert detect({}, medusa()) == detect({}, medusa(engine=True)) == "Medusa"
    assert detect({"speculators_model_type": "eagle3"}, {}) == "EAGLE"
    whole = {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }
    assert detect({}, whole) is detect({}, whole | {"mtp.fc.weight"}) is detect({}, {}) is None
    assert detect({}, whole | {"mtp.fc.weight"}, of_target=True) == "MTP" and detect({"pard_token": 1}, whole) == "PARD"


def as_shards(folder):
    """Two files, an index, and one that nobody asks for."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def beside_pickles(folder):
    for name in ("training_state.pt", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps({}))


def by_another_name(folder):
    (folder / "model.safetensors").rename(folder / "eagle.safetensors")


def beside_a_whole_model(folder):
    by_another_name(folder)
    save_file({f"model.layers.{n}.input_layernorm.weight": norm(4) for n in range(3)}, folder / "model.safetensors")


@pytest.mark.parametrize("change", [as_shards, beside_pickles, by_another_name, beside_a_whole_model])
def test_weights_lie_in_several_ways(learned, tmp_path, change):
    folder = learned.save(tmp_path / "head", **RIGHT)
    change(folder)
    loaded = paceline.load_drafter(folder, learned.target).network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in learned.network.state_dict().items())


def test_an_ordinary_model_stays_a_draft_model(target, tmp_path):
    noisy_copy(target).save_pretrained(tmp_path)
    assert [detect({}, each.files) for each in open_checkpoints(tmp_path)] == [None]
    assert paceline.load_drafter(tmp_path, target).traits.kind == "draft_lm"


def test_a_kept_drafter_is_loaded_again_when_its_files_change(learned, tmp_path):
    folder = learned.save(tmp_path / "head", **RIGHT)
    first = kept_drafter(folder, learned.target)
    assert kept_drafter(folder, learned.target) is first
    learned.save(folder, **RIGHT, model_type="qwen3")
    assert kept_drafter(folder, learned.target) is not first


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("EAGLE-Qwen2-7B-Instruct", "hf download yuhuili/EAGLE-Qwen2-7B-Instruct --revision refs/pr/1 --local-dir"),
        ("medusa-vicuna-7b-v1.3", "hf download FasterDecoding/medusa-vicuna-7b-v1.3 --revision refs/pr/1"),
        ("EAGLE3-LLaMA3.1-Instruct-8B", "nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted has them as safetensors"),
        ("EAGLE3-Vicuna1.3-13B", "paceline convert"),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_pickles_are_refused_with_what_to_do(target, tmp_path, monkeypatch, title, words, here):
    if here:
        folder = write(tmp_path / title, {"x": norm(2)}, config_of())
        (folder / "model.safetensors").unlink()
        (folder / "training_state.pt").write_bytes(b"")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        name = str(folder)
    else:
        name = f"someone/{title}"
        Hub(monkeypatch, {}, config_of(), ["config.json", "pytorch_model.bin", "training_state.pt"])
    said = sentence(
        lambda: paceline.load_drafter(name, target), words, "pytorch_model.bin, a pickle, which can run code"
    )
    if title.endswith("13B"):
        assert f"{name}/pytorch_model.bin -o FOLDER" in said if here else f"hf download {name}" in said


class Hub:
    """A model hub of one repository, and what it was asked for."""

    def __init__(self, monkeypatch, tensors, config, files=(), folder=None):
        from transformers import PreTrainedConfig

        self.asked, self.tensors, self.files, self.folder = [], tensors, list(files), folder
        monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: (config, {}))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(Path(self.folder or ".") / file))

    def snapshot(self, name, **options):
        if options.get("local_files_only"):
            raise FileNotFoundError(name)
        self.asked.append((name, options))
        return str(self.folder)

    def list_repo_files(self, name):
        return self.files

    def parse_safetensors_file_metadata(self, name, file):
        self.asked.append(file)
        return type("Metadata", (), {"tensors": dict.fromkeys(self.tensors)})


def test_a_hub_id_is_asked_for_its_names_and_fetched_without_pickles(learned, tmp_path, monkeypatch):
    folder = learned.save(tmp_path / "head", **RIGHT)
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors"]
    hub = Hub(monkeypatch, learned.tensors, config_of(**RIGHT), files, folder)
    drafter = paceline.load_drafter("someone/head", learned.target)
    assert drafter.name == "head" and drafter.traits.kind == "eagle"
    kept = {"allow_patterns": ["*.json", "*.safetensors", "*.md"]}
    assert hub.asked == ["model.safetensors", ("someone/head", kept)]


def test_an_ordinary_model_of_the_hub_is_not_fetched_for_its_names(target, monkeypatch):
    hub = Hub(monkeypatch, {"model.norm.weight": 0}, {"model_type": "llama"}, ["model.safetensors"])
    with pytest.raises(ValueError, match="someone/model"):
        paceline.load_drafter("someone/model", target)  # there is no hub, so it is not loaded either
    assert hub.asked == ["model.safetensors"]


def test_the_config_of_a_hub_id_tells_its_format_too(target, tmp_path, monkeypatch):
    folder = write(tmp_path, eagle3(), config_of(speculators_model_type="peagle"))
    hub = Hub(monkeypatch, eagle3(), {"model_type": "llama"}, ["config.json", "model.safetensors"], folder)
    sentence(lambda: paceline.load_drafter("someone/head", target), "has the format P-EAGLE")
    assert hub.asked == ["model.safetensors"], "it is not fetched"


def test_what_was_fetched_before_needs_no_network(learned, tmp_path, monkeypatch):
    folder = learned.save(tmp_path / "head", **RIGHT)
    files = ["config.json", "model.safetensors"]
    hub = Hub(monkeypatch, learned.tensors, config_of(**RIGHT), files, folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    assert paceline.load_drafter("someone/head", learned.target).traits.kind == "eagle" and hub.asked == []
    index = {"weight_map": {"fc.weight": "model-2-of-2.safetensors"}}  # it was stopped before this one came
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert paceline.load_drafter("someone/head", learned.target) and hub.asked == ["model.safetensors"]
