"""`paceline convert`: pickles of tensors become folders, in a process of their own, whole or not at all."""

import json
import os
import pickle
import signal
import subprocess
import zipfile

import paceline
import pytest
import torch
from formats.published import config_of, eagle3, write
from paceline.drafters.formats import convert
from paceline.drafters.formats.unpickle import main
from paceline.spec import cli
from safetensors.torch import load_file

from support.sentences import sentence


class Evil:
    """Runs code where a pickle is loaded as one."""

    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with an empty config, where we are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def refusal(name, capsys, output="out"):
    before = sorted(os.listdir())
    assert cli.main(["convert", name, "-o", output]) == 2
    said = capsys.readouterr()
    assert said.out == "" and sorted(os.listdir()) == before, "nothing is left"
    return said.err.splitlines()[-1]


def test_a_pickled_head_is_read_like_any_other(learned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {"eagle_aux_hidden_state_layer_ids": [2, 4, 7], "norm_before_residual": True, "rope_theta": 100.0}
    write(tmp_path / "pickled", {}, config_of(**config))
    os.remove("pickled/model.safetensors")
    torch.save(learned.tensors, "pickled/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"paceline convert pickled/pytorch_model.bin -o FOLDER"):
        paceline.load_drafter("pickled", learned.target)
    assert cli.main(["convert", "pickled/pytorch_model.bin", "-o", "head"]) == 0
    assert "head has the 15 tensors of pytorch_model.bin as safetensors, in the format EAGLE" in capsys.readouterr().out
    assert sorted(os.listdir("head")) == ["config.json", "model.safetensors"] and sorted(os.listdir()) == [
        "head",
        "pickled",
    ]
    loaded = load_file("head/model.safetensors")
    assert loaded.keys() == learned.tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in learned.tensors.items())
    drafter = paceline.load_drafter("head", learned.target)
    assert drafter.network.settings.taps == (1, 3, 6)


def test_code_in_a_pickle_is_not_run(desk, capsys):
    torch.save({"weight": Evil()}, "model.bin")
    with open("old.pt", "wb") as file:
        pickle.dump(Evil(), file, protocol=2)
    words = "it is no pickle of tensors alone, and what else is in it could run code"
    assert words in refusal("model.bin", capsys) and words in main("old.pt", "out")
    assert not (desk / "evil").exists()


CONTENTS = {
    "a list": ([torch.ones(2)], "holds a list and no tensors by their names"),
    "nothing": ({}, "holds a dict and no tensors"),
    "more": ({"weight": torch.ones(2), "epoch": 3}, "holds 'epoch', a int, and only named tensors are taken"),
    "nested": ({"state_dict": {"weight": torch.ones(2)}}, "holds 'state_dict', a dict"),
    "numbers for names": ({1: torch.ones(2)}, "holds 1, a Tensor"),
    "sparse": ({"weight": torch.ones(2, 2).to_sparse()}, "tensor 'weight' is not stored as plain numbers"),
    "meta": ({"weight": torch.empty(2, device="meta")}, "tensor 'weight' is not stored as plain numbers"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_other_contents_are_named(tmp_path, case):
    content, words = CONTENTS[case]
    torch.save(content, tmp_path / "model.bin")
    assert words in main(str(tmp_path / "model.bin"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["model.bin"]


def test_views_and_shared_tensors_are_written_each(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    content = {
        "whole": whole,
        "same": whole,
        "row": whole[1],
        "turned": whole.T,
        "parameter": torch.nn.Parameter(whole),
    }
    torch.save(content, tmp_path / "model.bin")
    assert main(str(tmp_path / "model.bin"), str(tmp_path / "out")) is None
    loaded = load_file(tmp_path / "out")
    assert (
        all(torch.equal(loaded[name], tensor) for name, tensor in content.items()) and loaded.keys() == content.keys()
    )


def test_damaged_files_are_named(tmp_path):
    torch.save(eagle3(), tmp_path / "whole.bin")
    data = (tmp_path / "whole.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.bin", "w") as file:
        file.writestr("a", "b")
    for name, content in (("half.bin", data[: len(data) // 2]), ("empty.bin", b""), ("text.bin", b"hello")):
        (tmp_path / name).write_bytes(content)
    for name in ("half.bin", "empty.bin", "text.bin", "zip.bin"):
        said = main(str(tmp_path / name), str(tmp_path / "out"))
        assert said and "\n" not in said and ("damaged" in said or "no pickle of tensors" in said), said
    assert not (tmp_path / "out").exists()


def test_weights_in_several_pickles(learned, desk, capsys, monkeypatch):
    """Their index is named where they are refused, and converted."""
    monkeypatch.setattr(convert, "_unpickle", lambda file, output: main(str(file), str(output)))  # in this process
    names = sorted(learned.tensors)
    parts = {f"pytorch_model-{part}-of-2.bin": names[part - 1 :: 2] for part in (1, 2)}
    for file, inside in parts.items():
        torch.save({name: learned.tensors[name] for name in inside}, file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    write(desk, {}, config_of(eagle_aux_hidden_state_layer_ids=[2, 4, 7], norm_before_residual=True, rope_theta=100.0))
    os.remove("model.safetensors")
    (desk / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    words = "pytorch_model-1-of-2.bin and others, pickles, which can run code, and they are not read"
    command = f"make a folder of them by paceline convert {desk / 'pytorch_model.bin.index.json'} -o FOLDER"
    sentence(lambda: paceline.load_drafter(desk, learned.target), words, command)
    assert cli.main(["convert", "pytorch_model.bin.index.json", "-o", "head"]) == 0
    assert "head has the 15 tensors of pytorch_model.bin.index.json as safetensors" in capsys.readouterr().out
    drafter = paceline.load_drafter("head", learned.target)
    loaded = drafter.network.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in learned.network.state_dict().items())
    torch.save(learned.tensors, "pytorch_model-2-of-2.bin")
    assert "another file has its tensor" in refusal("pytorch_model.bin.index.json", capsys)
    os.remove("pytorch_model-2-of-2.bin")
    assert "names pytorch_model-2-of-2.bin, which is no pickle here" in refusal("pytorch_model.bin.index.json", capsys)
    (desk / "pytorch_model.bin.index.json").write_text("[]")
    assert "is no index of weights" in refusal("pytorch_model.bin.index.json", capsys)


def test_what_is_missing_is_said(desk, capsys):
    assert "nowhere.bin is no file here" in refusal("nowhere.bin", capsys)
    (desk / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is none of .bin, .pt" in refusal("model.safetensors", capsys)
    (desk / "sub").mkdir()
    (desk / "sub" / "model.bin").write_bytes(b"")
    assert "has no config.json beside it" in refusal("sub/model.bin", capsys)
    for text, words in (("{", "is no JSON file"), ("[]", "holds no JSON object")):
        (desk / "sub" / "config.json").write_text(text)
        assert words in refusal("sub/model.bin", capsys)
    assert "sub is there already" in refusal("sub/model.bin", capsys, "sub")


def test_a_process_that_is_ended_leaves_nothing(desk, capsys, monkeypatch):
    """By lack of memory, a fault of its own, or Ctrl-C."""
    torch.save(eagle3(), "model.bin")
    real = subprocess.run

    def ended(arguments, **options):
        arguments[3].write_bytes(b"half")
        return subprocess.CompletedProcess(arguments, code, "", "Traceback\nOSError: no space left")

    monkeypatch.setattr(convert.subprocess, "run", ended)
    code = -signal.SIGKILL
    assert "the process that read it was ended by SIGKILL" in refusal("model.bin", capsys)
    code = 1
    assert "the process that read it failed (OSError: no space left)" in refusal("model.bin", capsys)

    def stopped(arguments, **options):
        arguments[3].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.subprocess, "run", stopped)
    assert cli.main(["convert", "model.bin", "-o", "out"]) == 130
    assert sorted(os.listdir()) == ["config.json", "model.bin"]
    monkeypatch.setattr(convert.subprocess, "run", real)
