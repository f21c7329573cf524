"""`paceline data prepare`: packing, the split, what is refused, and that it appears whole or not at all."""

import copy
import json
import lzma
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paceline.spec import cli
from paceline.training.data.documents import Document, tokenizer_fingerprint
from paceline.training.data.packing import pack, pieces, plan
from paceline.training.data.prepare import Settings, prepare
from paceline.training.data.rows import open_data

from support.data_runs import END as ENDS
from support.data_runs import PLAIN, read, talk
from support.models import tiny_llama


@pytest.fixture(scope="module")
def chat(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = PLAIN
    return made


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(8, 16))
def test_packing_loses_and_repeats_nothing(lengths, size):
    cut = [(stop - start) for length in lengths for start, stop in pieces(length, size)]
    assert sum(cut) == sum(lengths)
    rows = plan(cut, size)
    assert sorted(item for row in rows for item in row) == list(range(len(cut)))
    assert all(sum(cut[item] for item in row) <= size for row in rows)
    totals = sorted(sum(cut[item] for item in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > size, "two rows would fit in one"
    for row in rows:
        parts = [([7] * cut[item], [1] * cut[item]) for item in row]
        made = pack(parts, size)
        assert {len(column) for column in made.values()} == {size}
        for place, (number, position) in enumerate(zip(made["document"], made["position_ids"])):
            first = made["document"].index(number)
            assert position == place - first and made["loss_mask"][place] == (number >= 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_one_another(attention):
    """Positions that restart are enough for transformers to keep attention inside a document."""
    model = tiny_llama(attn_implementation=attention)
    texts = [[5, 9, 14], [30, 31, 32, 33, 34, 35], [40, 41]]
    row = pack([(text, [1] * len(text)) for text in texts], 16)
    ids, positions = (torch.tensor([row[name]]) for name in ("input_ids", "position_ids"))
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for number, text in enumerate(texts):
            alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
            inside = torch.tensor(row["document"]) == number
            torch.testing.assert_close(packed[inside], alone, atol=1e-5, rtol=1e-4)


def sources(tmp_path, count=60):
    records = [talk(f"A{chr(65 + i % 26)}B{chr(65 + i // 26)}", "DEF" * (1 + i % 9)) for i in range(count)]
    records += [{"text": "ABCDEFG" * (1 + i)} for i in range(9)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path)]


def test_the_data_set_holds_every_document_once(chat, tmp_path):
    names = sources(tmp_path)
    made = prepare(names, tmp_path / "out", chat, "tiny", ENDS, Settings(length=32, held_out=0.3))
    records = [json.loads(line) for line in Path(names[0]).read_text().splitlines()]
    cut = [(own, *piece) for own in read(chat, *records) for piece in pieces(len(own.tokens), 32)]
    teach = [(own, a, b) for own, a, b in cut if any(own.loss[a + 1 : b])]  # a first token is foretold by nothing
    truth = sorted(tuple(own.tokens[a:b]) for own, a, b in teach)
    assert 0 < len(teach) < len(cut)
    loaded, found, loss = datasets.load_from_disk(str(tmp_path / "out")), [], 0
    assert set(loaded) == {"train", "held_out"} and len(loaded["held_out"]) > 1
    for row in [*loaded["train"], *loaded["held_out"]]:
        loss += sum(row["loss_mask"])
        for number in range(max(row["document"]) + 1):
            found.append(tuple(t for t, own in zip(row["input_ids"], row["document"]) if own == number))
    assert sorted(found) == truth
    assert loss == sum(sum(own.loss[a:b]) for own, a, b in teach)
    assert loss == sum(count["loss_tokens"] for count in made["counts"].values())
    assert json.loads((tmp_path / "out" / "paceline.json").read_text()) == made
    assert made["tokenizer"] == tokenizer_fingerprint(chat)
    assert loaded["train"].features["input_ids"].feature.dtype == "int32"
    assert loaded["train"].features["loss_mask"].feature.dtype == "int8"


def test_the_split_is_stable_when_data_grows_and_keeps_a_prompt_on_one_side(chat, tmp_path):
    settings = Settings(length=32, held_out=0.3)
    keys = [own.key for own in read(chat, *(talk(f"A{chr(65 + i)}", "B") for i in range(26)))]
    sides = [settings.is_held_out(key) for key in keys]
    assert 2 < sum(sides) < 20
    assert Settings(held_out=0.6).is_held_out(keys[sides.index(True)]), "a larger share keeps what was held out"
    one, two = read(chat, talk("AB", "C"), talk("AB", "D"))
    assert isinstance(one, Document) and one.key == two.key


def test_the_same_input_gives_the_same_bytes(chat, tmp_path):
    names = sources(tmp_path)
    trees = []
    for name in ("one", "two"):
        prepare(names, tmp_path / name / "out", chat, "tiny", ENDS, Settings(length=32))
        base = tmp_path / name
        trees.append({str(p.relative_to(base)): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()})
    assert trees[0] == trees[1] and not [name for name in trees[0] if "partial" in name]


def test_a_second_run_does_nothing_and_another_is_refused(chat, tmp_path, capsys):
    names, out = sources(tmp_path), tmp_path / "out"
    first = prepare(names, out, chat, "tiny", ENDS, Settings(length=32))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare(names, out, chat, "tiny", ENDS, Settings(length=32)) == first
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="prepared with another settings"):
        prepare(names, out, chat, "tiny", ENDS, Settings(length=64))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is no prepared data set"):
        prepare(names, tmp_path / "mine", chat, "tiny", ENDS, Settings())


def test_sources_of_one_name_are_told_apart(chat, tmp_path, capsys):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "d.jsonl")
        paths[-1].write_text(json.dumps(talk(f"A{name}", "B")))
    settings = Settings(length=32, held_out=0.0)
    prepare([*map(str, paths)], tmp_path / "out", chat, "tiny", ENDS, settings)
    paths[0].write_text(json.dumps(talk("C", "D")))
    with pytest.raises(ValueError, match="prepared with another sources"):
        prepare([*map(str, paths)], tmp_path / "out", chat, "tiny", ENDS, settings)


def test_compressed_jsonl_holds_the_same_documents(chat, tmp_path):
    (name,) = sources(tmp_path)
    prepare([name], tmp_path / "plain", chat, "tiny", ENDS, Settings(length=32, held_out=0.3))
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(Path(name).read_bytes()))
    prepare([str(folder)], tmp_path / "out", chat, "tiny", ENDS, Settings(length=32, held_out=0.3))
    rows = [list(datasets.load_from_disk(str(tmp_path / own))["train"]) for own in ("plain", "out")]
    assert rows[0] == rows[1]
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(Path(name).read_bytes())[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        prepare([str(folder)], tmp_path / "cut", chat, "tiny", ENDS, Settings(length=32, held_out=0.3))


def test_a_split_without_rows_is_left_out(chat, tmp_path):
    prepare(sources(tmp_path), tmp_path / "out", chat, "tiny", ENDS, Settings(length=32, held_out=0.0))
    splits, about = open_data(tmp_path / "out")
    assert set(splits) == {"train"} and about["counts"]["held_out"]["rows"] == 0


def test_bad_sources_are_refused_in_one_sentence(chat, tmp_path, monkeypatch):
    empty, silent = tmp_path / "empty.jsonl", tmp_path / "silent.jsonl"
    empty.write_text("")
    silent.write_text(json.dumps(talk("ABC")) + "\n{broken\n")
    for name, words in [
        (empty, "holds no records"),
        (silent, "it has no answer to learn from; 1, in line 2: no JSON"),
        (tmp_path / "none.jsonl", "does not exist"),
    ]:
        with pytest.raises(ValueError, match=words):
            prepare([str(name)], tmp_path / "out", chat, "tiny", ENDS, Settings())
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    bare = copy.deepcopy(chat)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prepare(sources(tmp_path), tmp_path / "out", bare, "tiny", ENDS, Settings())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    with pytest.raises(ValueError, match="free and"):
        prepare(sources(tmp_path), tmp_path / "out", chat, "tiny", ENDS, Settings())
    for wrong in ({"length": 7}, {"held_out": 1.0}):
        with pytest.raises(ValueError):
            Settings(**wrong)


def test_a_mixture_gives_as_many_tokens_as_are_asked_for(chat, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(9):
        (tmp_path / "texts" / f"{number}.txt").write_text("ABCDEFGH"[: 2 + number % 6] * (3 + number))
    mixed = tmp_path / "m.yaml"
    mixed.write_text(f"sources: {{a: {{weight: 1, folder: '{tmp_path / 'texts'}'}}}}")
    with pytest.raises(ValueError, match="--tokens"):
        prepare([str(mixed)], tmp_path / "out", chat, "tiny", ENDS, Settings(length=32))
    settings = Settings(length=32, held_out=0.0, tokens=1500)
    made = prepare([str(mixed)], tmp_path / "out", chat, "tiny", ENDS, settings)
    count = made["counts"]["train"]
    assert 1500 <= count["tokens"] - count["documents"] < 1500 + 8 * 11, "an end of text each comes besides"


def test_the_command_prints_counts_and_an_estimate_first(chat, tmp_path, capsys):
    chat.save_pretrained(tmp_path / "tok")
    (tmp_path / "tok" / "config.json").write_text("{}")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("ABCDEFGH" * 20)
    (tmp_path / "raw" / "b.py").write_text("HGF" * 9)
    (tmp_path / "raw" / "c.bin").write_bytes(b"\xff\xfe")
    line = ["data", "prepare", str(tmp_path / "raw"), *sources(tmp_path), "-o", str(tmp_path / "out")]
    assert cli.main([*line, "--tokenizer", str(tmp_path / "tok"), "--length", "64", "--held-out", "0.1"]) == 0
    shown = capsys.readouterr()
    assert "raw, d.jsonl: about" in shown.err and "tokens (from" in shown.err and "MB are free" in shown.err
    assert "raw: left out 1 files of other kinds (.bin)" in shown.err
    assert "raw: read as text, 2 of 2 records\nd.jsonl: read as messages and text, 69 of 69 records" in shown.err
    assert "train: " in shown.out and "rows of 64" in shown.out
    assert torch.tensor(datasets.load_from_disk(str(tmp_path / "out"))["train"][0]["input_ids"]).shape == (64,)
