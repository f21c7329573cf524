"""EAGLE heads exported from folder to folder, and what would be read differently is noticed."""

import json
from functools import partial

import paceline
import pytest
import torch
from formats.exporting import EAGLE3, assert_same, exported, network_of, order_to, stored
from paceline.drafters.eagle.folder import save_network
from paceline.drafters.formats import probe
from paceline.drafters.formats.export_eagle import eagle_export
from paceline.training.objectives.eagle import EagleObjective
from safetensors.torch import save_file

from support.models import tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def target():
    return tiny_llama(num_hidden_layers=6)


@pytest.mark.parametrize(("engine", "words"), [("vllm", "eagle3"), ("sglang", "EAGLE3"), ("speculators", "vllm serve")])
def test_a_trained_folder_is_exported(target, tmp_path, engine, words):
    network = network_of(target, known=20, **EAGLE3)
    save_network(network, tmp_path / "mine", torch.float32)
    (tmp_path / "mine" / "acceptance.json").write_text(json.dumps({"p": [[0.9], [0.8], [0.1]]}))
    out = tmp_path / "out"
    done = paceline.export_drafter(tmp_path / "mine", target, engine, out, target_name="someone/target")
    assert words in done.serve and str(out) in done.serve and "2 draft tokens: the planner's" in done.notes[0]
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    if engine != "speculators":
        assert_same(network, target, engine, *stored(out))


@pytest.mark.parametrize(("layout", "reason"), [("wide", None), ("eagle1", None), ("joined", "objective.layout: wide")])
def test_what_is_trained_is_exported_or_told_how_to_train(target, tmp_path, layout, reason):
    rows = [{"input_ids": torch.arange(20)[None], "loss_mask": torch.ones(1, 20)}]
    settings = {"kind": "eagle", "layout": layout, "known_tokens": 20}
    objective = EagleObjective.build(settings | ({"taps": [0, 2, 4]} if layout == "wide" else {}), target, rows)
    objective.save(tmp_path / "mine")  # rounded
    network = paceline.load_drafter(tmp_path / "mine", target).network
    for engine in ("vllm", "sglang"):
        export = partial(paceline.export_drafter, tmp_path / "mine", target, engine, tmp_path / engine)
        if reason:
            sentence(export, reason)
            continue
        export()
        assert_same(network, target, engine, *stored(tmp_path / engine))


def test_a_published_head_goes_from_one_form_to_another(target, tmp_path, monkeypatch):
    """As if it had been tried on the target's text, of which a random head foretells nothing."""
    monkeypatch.setattr(probe, "choose", lambda network, ways, *about: ways.tried[0].settings)
    network = network_of(target, known=20, tap_norms=True, norm_output=True, **EAGLE3)
    exported(network, target, "speculators", tmp_path / "theirs")
    done = paceline.export_drafter(tmp_path / "theirs", target, "sglang", tmp_path / "out", None, "someone/target")
    assert "has not been measured" in done.notes[0] and done.tokens == 3
    assert_same(network, target, "sglang", *stored(tmp_path / "out"))


DAMAGES = {
    "a tensor": lambda config, tensors: tensors["fc.weight"][:, :32].mul_(1.1),
    "two states in each other's place": lambda config, tensors: tensors.update(
        {"fc.weight": tensors["fc.weight"].roll(32, 1).contiguous()}
    ),
    "rotary frequencies": lambda config, tensors: config["rope_parameters"].update(rope_theta=20.0),
    "the residual": lambda config, tensors: config.update(norm_before_residual=True),
    "what is fed back": lambda config, tensors: config.update(norm_output=True),
    "layers": lambda config, tensors: config.update(eagle_aux_hidden_state_layer_ids=[1, 2, 3]),
    "tokens": lambda config, tensors: tensors["d2t"][-1:].add_(1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_would_be_read_differently_is_noticed(target, tmp_path, damage):
    network = network_of(target, known=20, **EAGLE3)
    config, tensors = exported(network, target, "vllm", tmp_path)
    DAMAGES[damage](config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="please report it"):
        eagle_export(order_to("vllm", target), network).check(tmp_path)
