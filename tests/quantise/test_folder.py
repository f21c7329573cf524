"""The folder of a quantised model: read back to the same bits, and refused in one sentence where it is damaged."""

import json
import shutil

import pytest
import torch
from paceline import load_target
from paceline.spec.files import new_folder
from paceline.spec.quantise.folder import WEIGHTS, packed, unpacked, write_model
from paceline.spec.quantise.model import Recipe, quantise_model
from safetensors.torch import load_file, save_file

from support.blocks import some_texts
from support.models import tiny_llama
from support.sentences import sentence


def test_two_codes_share_a_byte():
    codes = torch.randint(0, 16, (5, 32), dtype=torch.uint8)
    assert packed(codes).shape == (5, 16) and torch.equal(unpacked(packed(codes)), codes)


def test_it_comes_back_to_the_same_bits(quantised, folder):
    model, tokenizer = load_target(folder, dtype="float32")
    assert tokenizer is not None and not model.training and model.generation_config.pad_token_id == 0
    ids = torch.tensor(some_texts())
    assert torch.equal(model(ids).logits, quantised(ids).logits)
    for name, layer in quantised.named_modules():
        if hasattr(layer, "blocks"):
            mine = model.get_submodule(name).blocks
            assert torch.equal(mine.codes, layer.blocks.codes) and torch.equal(mine.scales, layer.blocks.scales)
            assert (mine.offsets is None) == (layer.blocks.bits == 8)
            assert mine.offsets is None or torch.equal(mine.offsets, layer.blocks.offsets)
    layers = model.model.layers
    assert layers[0].self_attn.q_proj.rotation is layers[1].mlp.up_proj.rotation


def test_dtype_and_tokenizer_are_chosen_as_for_other_targets(folder):
    model, tokenizer = load_target(folder, dtype="bfloat16", with_tokenizer=False)
    assert model.dtype == torch.bfloat16 and tokenizer is None
    assert model.model.layers[0].self_attn.q_proj.blocks.scales.dtype == torch.float16
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_16_bits_stay_16_bits(quantised, tokenizer, tmp_path):
    from paceline.spec.quantise.folder import smallest_dtype

    assert smallest_dtype(quantised) == torch.float32
    assert smallest_dtype(torch.nn.Linear(3, 3).bfloat16().float()) == torch.bfloat16
    assert smallest_dtype(torch.nn.Linear(3, 3).half().float()) == torch.float16


def test_transformers_does_not_fill_it_with_random_numbers(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(folder)


def damaged(folder, tmp_path, section=None, tensors=None):
    """A copy of `folder` whose section or tensors a function has changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if section:
        config = json.loads((copy / "config.json").read_text())
        section(config["quantisation"])
        (copy / "config.json").write_text(json.dumps(config))
    if tensors:
        held = load_file(copy / WEIGHTS)
        tensors(held)
        save_file(held, copy / WEIGHTS)
    return copy


Q = "model.layers.0.self_attn.q_proj"
SECTIONS = {
    "another format": (lambda s: s.update(format=9), "update"),
    "no layers": (lambda s: s.pop("layers"), "layers"),
    "bits that are none": (lambda s: s["layers"][Q].update(bits=5), Q),
    "a form that is none": (lambda s: s["layers"].update({Q: 4}), Q),
    "another group": (lambda s: s["layers"][Q].update(group=64), "scales"),
    "a group that does not fit": (lambda s: s["layers"][Q].update(group=128), "multiple"),
    "a layer that is none": (lambda s: s["layers"].update(other=s["layers"][Q]), "other"),
    "a layer less": (lambda s: s["layers"].pop(Q), "lacks"),
    "blocks of 3": (lambda s: s["layers"][Q].update(rotation=3), Q),
    "blocks too large": (lambda s: s["layers"][Q].update(rotation=128), "multiple"),
}
TENSORS = {
    "codes are missing": (lambda t: t.pop(f"{Q}.codes"), "missing"),
    "codes of another size": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:-1].clone()}), "should be"),
    "scales of another dtype": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), "float16"),
    "a scale is NaN": (lambda t: t[f"{Q}.scales"].fill_(torch.nan), "NaN"),
    "offsets of another size": (lambda t: t.update({f"{Q}.offsets": torch.zeros(2, 2).half()}), "offsets"),
    "offsets are missing": (lambda t: t.pop(f"{Q}.offsets"), "offsets"),
    "signs are missing": (lambda t: t.pop("signs.64"), "signs.64"),
    "signs are numbers": (lambda t: t["signs.64"].fill_(2), "1 and -1"),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "a norm of another size": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "fit"),
    "a tensor too many": (lambda t: t.update({"other": torch.ones(3)}), "other"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_wrong_section_is_refused(folder, tmp_path, name):
    change, word = SECTIONS[name]
    copy = damaged(folder, tmp_path, section=change)
    sentence(lambda: load_target(copy), str(copy), word)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused(folder, tmp_path, name):
    change, word = TENSORS[name]
    copy = damaged(folder, tmp_path, tensors=change)
    sentence(lambda: load_target(copy), str(copy), word)


def test_files_that_cannot_be_read_are_refused(folder, tmp_path):
    copy = damaged(folder, tmp_path)
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    sentence(lambda: load_target(copy), str(copy), "paceline quantise")
    (copy / WEIGHTS).write_bytes(whole)
    (copy / "config.json").write_text("{")
    sentence(lambda: load_target(copy), str(copy), "paceline quantise")


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "made") as work:
            (work / "file").write_text("half")
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "made") as work:
        (work / "file").write_text("whole")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
    sentence(lambda: new_folder(tmp_path / "made").__enter__(), "made", "remove it")


def test_a_folder_is_of_no_processor_and_holds_blocks_once(tokenizer, tmp_path):
    """Also where a layer has a single group, whose scales share the memory of its packed form."""
    model = tiny_llama(hidden_size=32, intermediate_size=32)
    quantise_model(model, Recipe(4, 32, 8, "nearest"), [])
    write_model(model, tokenizer, tmp_path, {"base": "tiny", "bits": 4, "group": 32})
    kinds = {name.rpartition(".")[2] for name in load_file(tmp_path / WEIGHTS)}
    assert {"codes", "scales", "weight"} <= kinds and "packed" not in kinds
    ids = torch.arange(3, 9)[None]
    assert torch.equal(load_target(tmp_path)[0](ids).logits, model(ids).logits)
