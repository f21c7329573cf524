"""GGUF files that are damaged or lie: one sentence, before anything large is made of them."""

import random
import resource
import struct
import time

import paceline
import pytest
from paceline.spec import cli
from paceline.spec.target import gguf_model
from paceline.spec.target.gguf_file import GgufFile

from support.blocks import write_tiny
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = 24


@pytest.fixture(autouse=True)
def no_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file's bytes, and how many are before the tensors."""
    path = write_tiny(tmp_path_factory.mktemp("gguf") / "sound.gguf", ("Q4_0", "Q4_K"), head="Q6_K")
    file = GgufFile(path)
    return path.read_bytes(), min(tensor.start for tensor in file.tensors.values())


def refused(path, content, *words, weights="q4"):
    path.write_bytes(content)
    return sentence(lambda: paceline.load_target(path, weights=weights, dtype="float32"), str(path), *words)


def stated(content, name, number, form="<I"):
    """The file with another number for a setting."""
    place = content.index(name.encode()) + len(name) + 4
    return content[:place] + struct.pack(form, number) + content[place + struct.calcsize(form) :]


def with_tensor(content, name, **changes):
    """The file with another number of axes, first axis (the last of torch), type or place of a tensor."""
    place = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    fields = dict(zip(("axes", "first", "second", "kind", "offset"), struct.unpack_from("<IQQIQ", content, place)))
    fields |= changes
    return content[:place] + struct.pack("<IQQIQ", *fields.values()) + content[place + 32 :]


def test_files_that_are_none(tmp_path, capsys):
    path = tmp_path / "none.gguf"
    refused(path, b"", "cannot be read")
    for content in (b"GGUF", b"PK\3\4" + bytes(100), b"GGML" + bytes(100)):
        refused(path, content, "is no GGUF file")
    assert cli.main(["generate", "--model", str(path), "--prompt", "a"]) == 2
    assert "is no GGUF file" in capsys.readouterr().err


def test_files_that_are_cut_off(tmp_path, sound):
    content, data = sound
    path = tmp_path / "cut.gguf"
    for length in [*range(HEADER, data, 397), data - 1, data, data + 1000, len(content) - 33]:
        refused(path, content[:length], "cannot be used", "fetch it again")


LIES = {
    "tensors": lambda file: file[:8] + struct.pack("<Q", 1 << 60) + file[16:],
    "settings": lambda file: file[:16] + struct.pack("<Q", 1 << 60) + file[24:],
    "length of a name": lambda file: file[:24] + struct.pack("<Q", 1 << 62) + file[32:],
    "version": lambda file: file[:4] + struct.pack("<I", 7) + file[8:],
    "other byte order": lambda file: file[:4] + struct.pack(">I", 3) + file[8:],
    "length of an array": lambda file: stated(file, "tokenizer.ggml.tokens", 1 << 60, "<4xQ"),
    "arrays in an array": lambda file: stated(file, "tokenizer.ggml.tokens", 9),
    "layers": lambda file: stated(file, "llama.block_count", (1 << 32) - 1),
    "no layers": lambda file: stated(file, "llama.block_count", 0),
    "width": lambda file: stated(file, "llama.embedding_length", (1 << 31) - 1),
    "hidden width": lambda file: stated(file, "llama.feed_forward_length", 1 << 30),
    "heads": lambda file: stated(file, "llama.attention.head_count", 0),
    "heads of keys": lambda file: stated(file, "llama.attention.head_count_kv", 64),
    "axes": lambda file: with_tensor(file, "output.weight", axes=1 << 31),
    "no axes": lambda file: with_tensor(file, "output.weight", axes=0),
    "columns": lambda file: with_tensor(file, "output.weight", first=1 << 40),
    "rows": lambda file: with_tensor(file, "output.weight", second=1 << 63),
    "no rows": lambda file: with_tensor(file, "output.weight", second=0),
    "fewer rows": lambda file: with_tensor(file, "output.weight", second=100),
    "half a block": lambda file: with_tensor(file, "blk.0.attn_q.weight", first=250),
    "other columns": lambda file: with_tensor(file, "blk.0.attn_q.weight", first=128, second=512),
    "place": lambda file: with_tensor(file, "output.weight", offset=1 << 63),
    "type": lambda file: with_tensor(file, "output.weight", kind=99),
    "a name twice": lambda file: file.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"),
    "no text": lambda file: file.replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.weigh\xff"),
    "a tensor missing": lambda file: file.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
    "no layer's tensors": lambda file: file.replace(b"blk.", b"xxx."),
    "architecture": lambda file: file.replace(b"llama", b"alpac"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(tmp_path, sound, lie):
    content = LIES[lie](sound[0])
    assert content != sound[0]
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for weights in ("16", "q4"):
        refused(tmp_path / "lie.gguf", content, weights=weights)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} kB were taken in {time.perf_counter() - begun:.1f} s"


def test_types_and_architectures_that_are_not_known(tmp_path, sound):
    refused(tmp_path / "type.gguf", LIES["type"](sound[0]), "of type 99", "upgrade gguf")
    refused(tmp_path / "alien.gguf", LIES["architecture"](sound[0]), "alpac", "architecture")
    other = write_tiny(tmp_path / "other.gguf", architecture="qwen35").read_bytes()
    refused(tmp_path / "other.gguf", other, "of architecture qwen35", "load the model that the file was made from")


def test_a_piece_of_a_model_is_told_from_one(tmp_path, sound):
    content, _ = sound
    entry = struct.pack("<Q11sIH", 11, b"split.count", 2, 3)
    piece = content[:16] + struct.pack("<Q", struct.unpack_from("<Q", content, 16)[0] + 1) + entry + content[HEADER:]
    refused(tmp_path / "piece.gguf", piece, "is a piece of a model")


@pytest.mark.parametrize("part", range(4))
def test_random_damage_to_the_header(tmp_path, sound, part, monkeypatch):
    """It loads or is refused in a sentence; nothing else."""
    content, data = sound
    source, path, loaded = random.Random(part), tmp_path / "damaged.gguf", 0
    monkeypatch.setattr(gguf_model, "gguf_tokenizer", lambda file: None)
    end_of_settings = content.index(b"tokenizer.ggml.tokens")
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(source.choice((1, 1, 4))):
            region = source.choice((range(4, end_of_settings), range(data - 1500, data)))
            damaged[source.choice(region)] = source.choice((0, 1, 255, 128, source.randrange(256)))
        path.write_bytes(damaged)
        try:
            model, _ = paceline.load_target(path, weights="q4", dtype="float32")
            loaded += model is not None
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500 and str(path) in str(error)
    assert 0 < loaded < 60
