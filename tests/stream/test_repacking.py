"""What is repacked is one model, the one that is asked for, whatever happens to its files; and its size is foretold."""

import dataclasses
import errno
import json
import logging
import os
import shutil

import paceline
import pytest
import torch
from paceline.spec.kernels import cpu, native
from paceline.spec.stream import layout, repack, source
from paceline.spec.stream.forms import Device
from paceline.spec.stream.origin import origin_of, weight_files
from paceline.spec.stream.repack import folder_of, repacked
from stream.streaming import asked_for, assert_same, budget, folder_for, resident, saved, streamed

from support.blocks import write_tiny
from support.sentences import sentence

PROMPT = torch.tensor([[5, 9, 33, 12, 7, 40]])
FULL, FAILED = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO))


def failing(error, plain=None, after=0):
    """A function that does the work of `plain` so often, and then raises an error."""
    calls = []

    def call(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise error
        return plain(*arguments)

    return call


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def changing(tmp_path):
    """A model that a test may change."""
    return saved("llama", tmp_path / "model")


def test_a_model_that_changes_while_it_is_repacked(changing, tmp_path, monkeypatch):
    other, plain, files = saved("llama", tmp_path / "other", initializer_range=0.4), layout.FileWriter.finish, []

    def finish(writer):
        files.append(1)
        if len(files) == 3:
            os.replace(other / "model.safetensors", changing / "model.safetensors")
        return plain(writer)

    monkeypatch.setattr(layout.FileWriter, "finish", finish)
    sentence(lambda: streamed(changing), str(changing), "has changed while it was being repacked")
    resident.cache_clear()
    assert_same(resident(changing), streamed(changing), PROMPT)


def test_a_model_that_goes_away_while_it_is_repacked(changing, monkeypatch):
    plain = source.FolderSource.rows
    monkeypatch.setattr(source.FolderSource, "rows", failing(FAILED, plain, 9))
    said = sentence(lambda: streamed(changing), str(changing), "cannot be read (Input/output error)", "check the disk")
    assert "PACELINE_CACHE" not in said


def test_another_configuration_of_the_same_files_is_another_model(changing, capsys):
    budget(changing, 6)
    edit(changing, num_hidden_layers=4)
    resident.cache_clear()
    assert_same(resident(changing), streamed(changing, 4), PROMPT)
    edit(changing, num_hidden_layers=6, intermediate_size=40)
    sentence(lambda: streamed(changing), "is (48, 32) in its weights and (40, 32)", "fetch")


def test_what_was_repacked_of_earlier_files_is_named(changing, capsys):
    budget(changing, 6)
    first, size = folder_for(changing), folder_for(changing).bytes
    assert size > 100_000 and "delete" not in capsys.readouterr().err
    budget(changing, 6, "bfloat16")  # another form of the same files
    assert "delete" not in capsys.readouterr().err
    os.utime(changing / "model.safetensors", (1, 1))
    budget(changing, 6)
    said = capsys.readouterr().err
    assert "the model's files have changed: delete what was repacked before" in said and str(first.path) in said
    assert str(folder_for(changing).path) not in said.partition("delete")[2] and first.model() is not None


def interrupted(path, monkeypatch, **options):
    """Repack three files of the model of `path`; returns the list to which each further file that is written adds."""
    plain, written = layout.FileWriter.finish, []
    monkeypatch.setattr(layout.FileWriter, "finish", failing(FULL, plain, 3))
    with pytest.raises(ValueError, match="the disk is full"):
        paceline.load_target(path, **{**LOADED, **options})
    monkeypatch.setattr(layout.FileWriter, "finish", lambda writer: written.append(1) or plain(writer))
    return written


LOADED = dict(dtype="float32", device="cpu", with_tokenizer=False, stream="disk", resident="1GB")
ALL = 6 + 2  # layers, what stays in memory, and embeddings


@pytest.mark.parametrize(("change", "options"), [
    ("nothing", {}),
    ("what stays in memory", {"resident": "100kB"}),
    ("a dtype as it is stored", {"dtype": "auto"}),
    ("a tokenizer", {"with_tokenizer": True}),
    ("code of its own", {"trust_remote_code": True}),
    ("another name of the folder", {}),
    ("a setting of generation", {}),
])  # fmt: skip
def test_what_an_interrupted_repacking_goes_on_with(change, options, changing, tmp_path, tokenizer, monkeypatch):
    written, path = interrupted(changing, monkeypatch), changing
    if change == "a tokenizer":
        tokenizer.save_pretrained(changing)
    elif change == "another name of the folder":
        path = tmp_path / "link"
        path.symlink_to(changing)
    elif change == "a setting of generation":
        (changing / "generation_config.json").write_text('{"do_sample": true}')
    paceline.load_target(path, **{**LOADED, **options})
    assert len(written) == ALL - 3


@pytest.mark.parametrize(
    ("change", "files"),
    [("dtype", ALL), ("kernels", ALL), ("format", ALL), ("weights", ALL), ("configuration", ALL - 2), ("copy", ALL)],
)
def test_what_makes_an_interrupted_repacking_begin_anew(change, files, changing, tmp_path, monkeypatch):
    """Each changes what the files hold, or what they are made of; what the other had written is still there."""
    written, path, options = interrupted(changing, monkeypatch), changing, {}
    before = folder_for(changing).path
    if change == "dtype":
        options = {"dtype": "bfloat16"}
    elif change == "kernels":
        monkeypatch.setattr(native, "prepare", lambda: False)
    elif change == "format":
        for module in (layout, repack):
            monkeypatch.setattr(module, "FORMAT", layout.FORMAT + 1)
    elif change == "weights":
        os.utime(changing / "model.safetensors", (1, 1))
    elif change == "configuration":
        edit(changing, num_hidden_layers=4)
    else:
        path = shutil.copytree(changing, tmp_path / "copy")
    paceline.load_target(path, **{**LOADED, **options})
    assert len(written) == files and len(list(before.glob("layer-*.json"))) == 3


def test_other_bits_of_the_same_file_begin_anew(tmp_path, monkeypatch):
    path = write_tiny(tmp_path / "tiny.gguf", ("Q4_K", "Q6_K"))
    written = interrupted(path, monkeypatch, weights="q4")
    layers = paceline.load_target(path, **LOADED)[0].config.num_hidden_layers
    assert len(written) == layers + 2
    paceline.load_target(path, weights="q4", **LOADED)
    assert len(written) == 2 * (layers + 2) - 3, "that of the first bits goes on"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("bfloat16", "auto"), ("float32", "float32")])
def test_the_room_that_is_needed_is_foretold(family, stored, asked, tmp_path, monkeypatch):
    """Also where the processor emulates bfloat16, and computes in float32."""
    monkeypatch.setattr(cpu, "emulates_bfloat16", lambda device: True)
    path = saved(family, tmp_path / "model", stored, vocab_size=4001, tie_word_embeddings=True)
    dtype = asked if asked == "auto" else torch.float32
    made = origin_of(dataclasses.replace(asked_for(path), dtype=dtype))
    device = Device(torch.device("cpu"), made.dtype)
    folder = folder_of(made, device)
    foretold = made.bytes_repacked(device.in_panels)
    repacked(made, folder, device, "it")
    merged = sum(each.nbytes for each in made.skeleton().parameters() if each.ndim > 2)
    assert made.dtype == torch.float32
    assert sum(file.stat().st_size for file in folder.path.glob("*.bin")) == pytest.approx(foretold - merged, rel=0.1)


def test_a_full_disk_while_transformers_converts(tmp_path, monkeypatch):
    path = saved("mixtral", tmp_path / "model")
    for error in (FULL, RuntimeError(f"IoError: {FULL.strerror} (os error 28)")):
        monkeypatch.setattr(source.FolderSource, "__init__", failing(error))
        sentence(lambda: streamed(path), "the disk is full", "PACELINE_CACHE")


@pytest.mark.parametrize(
    ("error", "words"),
    [(FULL, ["the disk is full at layer-000"]), (FAILED, ["layer-000.bin cannot be written (Input/output error)"])],
)
def test_writing_that_fails_in_the_middle_of_a_file(error, words, path, monkeypatch):
    class Failing:
        def __init__(self, *arguments):
            self.file = open(*arguments)  # noqa: SIM115

        def write(self, data):
            raise error

        def close(self):
            self.file.close()

    monkeypatch.setattr(
        layout, "open", lambda *arguments: (Failing if "wb" in arguments else open)(*arguments), raising=False
    )
    sentence(lambda: streamed(path), *words, "PACELINE_CACHE")


def test_what_transformers_refuses_is_told_in_a_sentence(changing):
    edit(changing, model_type="nosuch")
    load = dict(with_tokenizer=False, device="cpu")
    for options in (dict(), dict(stream="disk", resident="1GB")):
        sentence(
            lambda options=options: paceline.load_target(changing, **load, **options),
            f"model folder {changing} cannot be loaded (ValueError: ", "nosuch", "check the files",
        )  # fmt: skip


def test_accelerates_warnings_are_what_they_were(path):
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    streamed(path)
    assert logger.level == before


def test_weights_that_are_there_twice_count_once(changing, tmp_path):
    shutil.copy(changing / "model.safetensors", changing / "consolidated.safetensors")
    assert weight_files(changing) == [changing / "model.safetensors"]
    resident(changing).save_pretrained(tmp_path / "pieces", max_shard_size="20kB")
    shutil.copy(changing / "model.safetensors", tmp_path / "pieces")
    files = weight_files(tmp_path / "pieces")
    assert len(files) > 2 and all("-of-" in file.name for file in files)
    assert_same(resident(changing), streamed(tmp_path / "pieces"), PROMPT)
