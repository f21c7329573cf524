"""Weights of every form stream as they are in memory, and whoever reads weights finds them."""

import copy
import os
import pickle
import shutil
import zlib

import paceline
import pytest
import torch
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.spec.kernels import native
from paceline.spec.kernels.blocks import Blocks
from paceline.spec.kernels.linears import Packing
from paceline.spec.kernels.panel_linear import PanelLinear
from paceline.spec.kernels.panels import pack_blocks, pack_dense
from paceline.spec.provenance import target_fingerprint
from paceline.spec.quantise.folder import write_model
from paceline.spec.quantise.model import Recipe, quantise_model
from paceline.spec.stream.layout import FORMAT, StreamFolder
from paceline.spec.stream.streamer import streamer_of
from paceline.spec.target.selftest import FORWARDS, attach
from paceline.spec.target.weights import (
    dense_parameters,
    dense_weight,
    embedding_rows,
    embedding_weight,
    head_rows,
    head_weight,
    parameter_count,
    stored_bytes,
)
from stream.streaming import assert_same, resident, saved, streamed, text

from support.blocks import some_texts, write_tiny
from support.families import STATEFUL, build, tiny
from support.models import random_eagle
from support.sentences import sentence

TESTED = StreamFolder.tested
PROMPT = torch.tensor([[5, 9, 33, 12, 7, 40, 5, 9, 33, 12]])


@pytest.mark.parametrize(("bits", "weights"), [(4, "16"), (8, "q8-int8")])
def test_a_quantised_folder(bits, weights, tokenizer, tmp_path):
    """Rotated, with biases, and a head of its own."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=16)
    model = tiny("qwen2", tie_word_embeddings=True, **sizes)
    quantise_model(model, Recipe(bits=bits, group=32), some_texts(count=2, length=20))
    folder = tmp_path / "quantised"
    folder.mkdir()
    write_model(model, tokenizer, folder, {"base": "tiny", "bits": bits, "group": 32})
    here, away = resident(folder, weights=weights), streamed(folder, 3, weights=weights)
    assert_same(here, away, PROMPT, drafter="ngram")
    assert target_fingerprint(here) == target_fingerprint(away) and stored_bytes(here) == stored_bytes(away)


@pytest.mark.parametrize(("name", "bits"), [("mamba", 4), ("mamba", 16), ("jamba", 8), ("jamba", 16), ("mamba2", 8)])
def test_layers_that_look_at_weights_themselves(name, bits, tokenizer, tmp_path):
    """Those of Mamba-1 multiply with one, which stays dense; Mamba and Mamba-2 ask for the dtype of the head."""
    ranks = {"mamba": dict(time_step_rank=32), "jamba": dict(mamba_dt_rank=32), "mamba2": {}}
    model = build(name, STATEFUL[name] | ranks[name] | dict(num_hidden_layers=4))
    folder = tmp_path / "model"
    if bits == 16:
        model.save_pretrained(folder)
    else:
        quantise_model(model, Recipe(bits=bits, group=32, method="nearest"), [])
        folder.mkdir()
        write_model(model, tokenizer, folder, {"base": "tiny", "bits": bits, "group": 32})
    here = resident(folder)
    plain = here.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for model in (here, streamed(folder, 4)):
        assert torch.equal(plain, text(model, PROMPT, drafter="ngram", eos_token_id=None)[0])


@pytest.mark.parametrize(
    ("kinds", "weights", "dtype"), [(("Q4_K", "Q6_K"), "q4", "bfloat16"), (("F16",), "16", "float32")]
)
def test_a_gguf_file(kinds, weights, dtype, tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", kinds)
    here = paceline.load_target(path, dtype, "cpu", weights=weights)[0]
    away, tokenizer = paceline.load_target(path, dtype, "cpu", weights=weights, stream="disk", resident=10**9)
    assert streamer_of(away).about.bytes_per_forward == 0 and tokenizer is not None
    for model in (away, streamed(path, 2, dtype, weights, buffers=1)):
        assert_same(here, model, PROMPT % 32, drafter="ngram")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_our_kernels_weights_are_views_of_the_buffers(dtype, tmp_path, monkeypatch):
    """In float16, or where the processor has none."""
    if dtype == "bfloat16":
        monkeypatch.setattr(native, "prepare", lambda: False)
    path = saved("qwen2", tmp_path / "model", dtype)
    here, away = resident(path, dtype), streamed(path, 4, dtype)
    layer = away.model.layers[0].self_attn.q_proj
    assert type(layer) is torch.nn.Linear and layer.weight.isnan().all(), "there are no numbers between its runs"
    assert_same(here, away, PROMPT, drafter="ngram")
    assert layer.weight.isnan().all() and layer.weight.shape == (32, 32)


def test_blocks_without_our_kernels(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "prepare", lambda: False)
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=16)
    quantise_model(model, Recipe(bits=4, group=32, method="nearest"), [])
    folder = tmp_path / "quantised"
    folder.mkdir()
    write_model(model, tokenizer, folder, {"base": "tiny", "bits": 4, "group": 32})
    here, away = resident(folder), streamed(folder, 3)
    assert_same(here, away, PROMPT)
    layer = away.model.layers[0].self_attn.q_proj
    assert layer.dense is None, "what is dequantised lasts as long as the layer runs"


@pytest.mark.parametrize("tied", [False, True])
def test_views_of_weights_are_those_of_the_resident_model(tied, tmp_path):
    path = saved("llama", tmp_path / "model", "bfloat16", tie_word_embeddings=tied)
    here, away = resident(path, "bfloat16"), streamed(path, 6, "bfloat16")
    rows = torch.tensor([60, 3, 3, 17])
    for view in (head_rows, embedding_rows):
        assert torch.equal(view(here, rows), view(away, rows))
    for view in (head_weight, embedding_weight):
        assert torch.equal(view(here), view(away))
    for module in ("input_embeddings", "output_embeddings"):  # of which a draft that was trained here may lack copies
        both = (dense_parameters(getattr(model, f"get_{module}")())["weight"] for model in (here, away))
        assert torch.equal(*both)
    assert parameter_count(away) == parameter_count(here) + (61 * 32 if tied else 0), "a tied head is there twice"
    assert target_fingerprint(here) == target_fingerprint(away)
    assert (
        away.device.type == "cpu" and away.dtype == torch.bfloat16 and away.get_input_embeddings().weight.isnan().all()
    )


def test_a_drafter_that_needs_the_targets_embeddings_and_head(path):
    here, away = resident(path), streamed(path, 5)
    texts = []
    for model in (here, away):
        network = random_eagle(model)
        texts.append(paceline.generate(model, PROMPT, drafter=EagleDrafter(network), max_new_tokens=12, tree="3x2"))
    assert torch.equal(*texts)


def test_a_bfloat16_model_in_float32_streams_half_the_bytes(tmp_path):
    """Where the processor emulates bfloat16; its numbers are exact in it."""
    path = saved("llama", tmp_path / "model", "bfloat16")
    wide, narrow = (streamed(path, 6, dtype) for dtype in ("float32", "bfloat16"))
    assert streamer_of(wide).about.bytes_per_forward == streamer_of(narrow).about.bytes_per_forward
    assert_same(resident(path, "float32"), wide, PROMPT)


def test_the_self_test_runs_once_for_a_repacked_folder(path, capsys, monkeypatch):
    monkeypatch.setattr(StreamFolder, "tested", TESTED)
    for line in ("testing the streamed model, once, in 16 forwards that fetch 0.0 GB", ""):
        capsys.readouterr()
        model = streamed(path)
        before = streamer_of(model).record.forwards
        attach(model)
        assert line in (said := capsys.readouterr().err) and ("testing" in said) == bool(line)
        assert streamer_of(model).record.forwards - before == (FORWARDS if line else 0)


def test_a_changed_source_is_repacked_anew(tmp_path):
    path = saved("llama", tmp_path / "model")
    first = streamed(path)
    shutil.rmtree(path)
    saved("llama", path, initializer_range=0.4)
    os.utime(path / "model.safetensors", (1, 1))
    second = streamed(path)
    assert first is not second and not torch.equal(head_weight(first), head_weight(second))
    resident.cache_clear()
    assert_same(resident(path), second, PROMPT)


def test_the_form_of_panels_is_the_one_that_folders_hold():
    """Where this changes, folders of before must not be read: raise FORMAT in spec/stream/layout.py, and put in the new
    number."""
    weight = torch.arange(20 * 6).view(20, 6).bfloat16()
    blocks = Blocks((weight.int() % 16).byte().repeat(1, 16), weight.half(), None, 8, 4)
    packed = pack_dense(weight, torch.arange(20).bfloat16(), 16)[0], pack_blocks(blocks, None, 16)[0]
    sums = [zlib.crc32(each.view(-1).view(torch.uint8).numpy()) for each in packed]
    assert (FORMAT, *sums) == (1, 4019862233, 3686520741)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(stream="tape"), ["stream='tape'", "use 'disk'"]),
        (dict(stream="host"), ["stream='host'", "on a CPU use 'disk'"]),
        (dict(resident="1GB"), ["resident='1GB'", "pass stream="]),
        (dict(stream="disk", resident="much"), ["resident='much'", "'8GB'"]),
        (dict(stream="disk", resident=0), ["resident=0", "'8GB'"]),
        (dict(stream="disk", weights="q4"), ["weights='q4'", "holds no weights in blocks"]),
        (dict(stream="disk", resident="4kB"), ["resident=0.0 MB is too little", "allow at least 0.1MB"]),
    ],
)
def test_what_cannot_be_is_told(options, words, path):
    sentence(lambda: paceline.load_target(path, with_tokenizer=False, **options), *words)


def test_the_least_budget_that_is_told_is_enough(path):
    told = sentence(lambda: paceline.load_target(path, with_tokenizer=False, stream="disk", resident=1), "at least")
    model, _ = paceline.load_target(
        path, "float32", "cpu", with_tokenizer=False, stream="disk", resident=told.rpartition(" ")[2]
    )
    assert_same(resident(path), model, PROMPT)


def test_a_streamed_model_stays_what_it_is(path, tmp_path):
    model = streamed(path)
    sentence(lambda: copy.deepcopy(model), "cannot be copied", "load it a second time")
    sentence(lambda: pickle.dumps(model), "cannot be pickled")
    sentence(lambda: model.save_pretrained(tmp_path / "out"), "streamed")
    sentence(
        lambda: paceline.generate(model, PROMPT, executor="compiled", max_new_tokens=2),
        "the target waits for the host",
        "'eager'",
    )


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "16"), ("float16", "16"), ("bfloat16", "q4")])
def test_a_streamed_model_is_neither_cast_nor_moved(dtype, weights, tmp_path):
    if weights == "q4":
        model = streamed(write_tiny(tmp_path / "tiny.gguf", ("Q4_K", "Q6_K")), 2, dtype, weights, buffers=1)
    else:
        model = streamed(saved("llama", tmp_path / "model", dtype), 4, dtype)
    moves = (lambda part: part.half(), lambda part: part.float(), lambda part: part.to("cpu"), lambda part: part.cuda())
    for part in (model, model.model, model.model.layers[0].mlp.up_proj, model.get_input_embeddings()):
        for move in moves:
            sentence(lambda move=move, part=part: move(part), "neither cast nor moved", "load it anew")


@pytest.mark.parametrize(("dtype", "weights"), [("float32", "16"), ("bfloat16", "16"), ("bfloat16", "q4")])
def test_weights_that_are_not_there_are_no_numbers(dtype, weights, tmp_path):
    """Between the runs of their layers."""
    if weights == "q4":
        model = streamed(write_tiny(tmp_path / "tiny.gguf", ("Q4_K", "Q6_K")), 2, dtype, weights, buffers=1)
    else:
        model = streamed(saved("llama", tmp_path / "model", "bfloat16"), 6, dtype)
    for _ in range(2):
        for layer in model.model.layers:
            for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
                assert dense_weight(linear).isnan().all()
        text(model, PROMPT % 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_in_panels_is_the_layer(dtype, exact, biased):
    """Its numbers, some rows of them, its biases, and the very bits of its products."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(35, 70, biased).requires_grad_(False)
    linear = (linear.bfloat16() if exact else linear).to(dtype)
    packed, form = pack_dense(linear.weight, linear.bias, native.panel_width())
    layer, rows = PanelLinear(packed, 70, 35, dtype, biased), torch.tensor([69, 2, 2])
    x = torch.randn(3, 35, dtype=dtype)
    with Packing([linear]):
        assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.dense(), linear.weight) and torch.equal(layer.dense(rows), linear.weight[rows])
    assert (layer.bias is None) if linear.bias is None else torch.equal(layer.bias, linear.bias)
    assert (packed.dtype == torch.float32) == (dtype == torch.float32 and not exact) and form.bits == 16
