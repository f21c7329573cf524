"""Files and data sets as they are: what kind they are by their content, and that every record is accounted for."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest
from paceline.spec.data import entries
from paceline.spec.data.content import Unfit
from paceline.spec.data.data_sets import DataSet, Parquet
from paceline.spec.data.files import Lines, Texts, Values
from paceline.spec.data.reading import Reading, Unusable
from paceline.spec.data.sources import open_source, open_sources

from support.sentences import sentence

CHAT = {"conversations": [{"from": "human", "value": "a\u2028b\u0085c"}, {"from": "gpt", "value": "d"}]}
PROMPT = {"prompt": "x"}


def line(entry):
    return json.dumps(entry, ensure_ascii=False).encode()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, columns=None, split="train"):
    return list(Reading(open_source(path, split), columns).each(lambda record: record))


TWO = line(CHAT) + b"\n" + line(PROMPT)
PRETTY = json.dumps([CHAT, PROMPT], indent=2).encode()
KINDS = [
    ("chats.jsonl", TWO, Lines),
    ("chats.ndjson", TWO, Lines),
    ("CHATS.JSONL", TWO, Lines),
    ("chats.txt", TWO, Lines),
    ("chats", TWO + b"\n\n", Lines),
    ("chats.json", b"\n" + TWO.replace(b"\n", b"\r\n"), Lines),
    ("bom.jsonl", b"\xef\xbb\xbf" + TWO, Lines),
    ("chats.json", json.dumps([CHAT, PROMPT]).encode(), Values),
    ("chats.jsonl", PRETTY, Values),
    ("chats.md", b"\xef\xbb\xbf" + PRETTY, Values),
    ("one by one.json", json.dumps(CHAT, indent=1).encode() + b"\n" + json.dumps(PROMPT, indent=1).encode(), Values),
]


@pytest.mark.parametrize(("name", "content", "kind"), KINDS, ids=[name for name, _, _ in KINDS])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_content_decides_and_not_the_suffix(tmp_path, capsys, name, content, kind, pack):
    path = write(tmp_path, name, pack(content))
    assert type(open_source(path)) is kind
    chat, prompt = read(path)
    assert chat.turns == ("a\u2028b\u0085c",) and prompt.turns == ("x",) and (chat.number, prompt.number) == (1, 2)
    assert f"{name}: read as ShareGPT and prompts, 2 of 2 records\n" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.md", "[![badge](a)](b)\n\n{ a note }\n"),
        ("plain", "Once upon a time.\nThere was.\n"),
        ("a.c", "{\n  int x;\n}\n"),
        ("list.txt", "[1] a reference\n[2] another\n"),
        ("code.py", "x = 1\nprint({'a': x})\n"),
    ],
)
def test_text_is_text(tmp_path, name, content):
    path = write(tmp_path, name, "\ufeff" + content.replace("\n", "\r\n"))
    assert type(open_source(path)) is Texts
    assert [record.text for record in read(path)] == [content]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            '[{"prompt": "x"}, {"prompt": "y"}',
            "a.json looks like JSON records and is none (',' or ']' is missing",
        ),
        ("a.txt", '[\n {"prompt": "x"},\n {"prompt": y}]', "is none (Expecting value, line 3)"),
        ("a.txt", '{"prompt": "x', "none of its 1 records can be used (1, in line 1: no JSON (Unterminated string"),
        ("a.jsonl", "Why is the sky blue?", "none of its 1 records can be used (1, in line 1: no JSON"),
        ("a.json", '["a", "b"]', "none of its 2 records can be used (2, the first in line 1: it is a JSON text"),
        ("a.json", '[{"a":' * 99999, "a.json looks like JSON records and is none (nested too deeply, line 1)"),
        ("a.json", "[]", "a.json holds no records; each line of it is one, such as"),
        ("a.jsonl", "", "a.jsonl holds no records"),
        ("a.jsonl", TWO.decode().encode("utf-16"), "a.jsonl is text in UTF-16; save it as"),
        ("a.csv", "prompt,answer\nx,y\n", "a.csv is a table of text; save it as JSON lines or Parquet"),
        ("a.gz", gzip.compress(TWO * 99)[:-9], "a.gz is damaged"),
        ("a.xz", lzma.compress(TWO * 99)[:-9], "a.xz is damaged"),
        ("a.bz2", b"BZh" + bytes(40), "a.bz2 is damaged"),
        ("a.parquet", b"PAR1" + bytes(40), "a.parquet is damaged"),
        ("a.zip", b"PK\x03\x04" + bytes(40), "a.zip is a zip archive"),
        (
            "a.txt",
            "caf\xe9".encode("latin-1"),
            "none of its 1 records can be used (1, in a.txt: it is no text in UTF-8",
        ),
    ],
)
def test_what_is_no_file_of_records_is_refused_in_a_sentence(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    sentence(lambda: read(path), words.replace("a.", str(tmp_path / "a."), 1) if "looks" in words else words)


def test_names_that_stand_for_nothing(tmp_path):
    for name in ("none.jsonl", "a/b/c", "nowhere/none.parquet", str(tmp_path / "none")):
        sentence(lambda name=name: open_source(name), "does not exist", "owner/name")
    sentence(lambda: open_source(tmp_path), "is a folder and no data set")


def test_every_line_is_taken_or_left_out_with_its_reason(tmp_path, capsys):
    deep = b'{"prompt":' + b"[" * 99999
    content = [
        line(PROMPT),
        b"",
        b'{"prompt": "\\ud800"}',
        b"{",
        line(CHAT),
        deep,
        b'{"prompt": "\xff"}',
        b"{",
        b"\xa0",
    ]
    content += [b'{"text": "x", "n": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud83d\\ude00"}', line({"a": 1}), line([])]
    path = write(tmp_path, "p.jsonl", b"\n".join(content))
    reading = Reading(open_source(path))
    made = list(reading.each(lambda record: record.turns))
    assert [made[0], made[3], made[-3]] == [("x",), ("a\u2028b\u0085c",), ("\U0001f600",)]
    assert [type(one) for one in made].count(Unusable) == reading.left_out == 9 and reading.taken == 3
    assert made[1] == Unusable("p.jsonl:2", "it holds half of a surrogate pair or is no UTF-8, and so no text")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "p.jsonl: read as prompts and ShareGPT, 3 of 12 records"
    assert (
        "  left out 3, the first in line 4: no JSON (Expecting property name enclosed in double quotes, column 2)"
        in said
    )
    assert "  left out 2, the first in line 7: it is no text in UTF-8" in said
    assert "  left out 1, in line 6: its JSON is nested too deeply" in said
    assert len(said) == 1 + 5 + 1 and said[-1] == "  left out 1 for 1 other reasons"


def test_an_array_names_lines_too_and_keeps_its_other_records(tmp_path, capsys):
    path = write(tmp_path, "p.json", b'[{"prompt": "x"},\n {"prompt": "\xff"},\n\n {"a": 1}, {"prompt": "\\udfff"}]')
    assert [isinstance(one, Unusable) for one in read(path)] == [False, True, True, True]
    said = capsys.readouterr().err
    assert "left out 2, the first in line 2: it holds half" in said and "left out 1, in line 4: it is of no" in said


def test_a_few_of_many_are_read_without_the_others(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, "p.jsonl", b"".join(line({"prompt": str(number)}) + b"\n\n" for number in range(30_000)))
    parsed, parse = [], entries.Entry.parsed
    monkeypatch.setattr(entries.Entry, "parsed", lambda entry: parsed.append(entry.number) or parse(entry))
    taken = Reading(open_source(path)).spread(8, lambda record: record.turns[0])
    assert taken == [str(number) for number in range(0, 30_000, 3750)] and len(parsed) == 8
    assert capsys.readouterr().err == "p.jsonl: read as prompts, 8 of 30,000 records, spread evenly\n"


def test_some_are_spread_over_what_can_be_used(tmp_path):
    lines = [line({"prompt": str(number)}) if number % 4 else b"{" for number in range(40)]
    source = open_source(write(tmp_path, "p.jsonl", b"\n".join(lines)))
    good = [str(number) for number in range(40) if number % 4]
    reading = Reading(source)
    for most in (1, 7, 30, 40, 99, None):
        count = min(most or 99, len(good))
        expected = [good[number * len(good) // count] for number in range(count)]
        assert reading.spread(most, lambda record: record.turns[0]) == expected

    def even(record):
        if int(record.turns[0]) % 2:
            raise Unfit("odd")
        return record.turns[0]

    assert Reading(source).spread(99, even) == [number for number in good if int(number) % 2 == 0]
    assert Reading(source).spread(6, even, key=lambda turn: turn[-1]) == ["2", "6", "10", "14", "18"]


def test_parquet_and_data_sets_are_the_same_records(tmp_path, capsys):
    rows = [{"conversations": CHAT["conversations"], "id": str(number)} for number in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a [1].parquet")
    (tmp_path / "renamed.bin").write_bytes((tmp_path / "a [1].parquet").read_bytes())
    data.save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    for name, split, kind in (
        ("a [1].parquet", "train", Parquet),
        ("renamed.bin", "train", Parquet),
        ("set", "train", DataSet),
        ("splits", "test", DataSet),
    ):
        source = open_source(tmp_path / name, split)
        assert type(source) is kind and source.count() == 5
        assert [(record.id, record.turns) for record in read(tmp_path / name, split=split)] == [
            (str(number), ("a\u2028b\u0085c",)) for number in range(5)
        ]
        assert "read as ShareGPT, 5 of 5 records" in capsys.readouterr().err
        assert Reading(source).spread(2, lambda record: (record.id, record.number)) == [("0", 1), ("2", 3)]
        assert len(source.fingerprint()) >= 16
    sentence(lambda: read(tmp_path / "splits"), "has no split 'train'; give --split test")
    columns = {"messages": "conversations", "category": "id"}
    assert [record.category for record in read(tmp_path / "set", columns)] == list("01234")


def test_a_hub_id_may_name_a_subset(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"question": "Why?", "answer": "So."}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = read("openai/gsm8k:main", {"prompt": "question", "completion": "answer"}, "test")
    read("someone/data", {"prompt": "question"})
    assert asked == [("openai/gsm8k", "main", "test"), ("someone/data", None, "train")]
    assert [message["content"] for message in record.messages] == ["Why?", "So."]


def test_a_folder_gives_its_records_and_texts_and_says_what_it_leaves(tmp_path, capsys):
    folder = tmp_path / "raw"
    (folder / "inner").mkdir(parents=True)
    for name, content in (
        ("a.txt", "abc"), ("inner/b.PY", "x = 1"), ("inner/c.ndjson", TWO), ("d.json", PRETTY), ("e.JSON.gz", b""),
        ("package.json", b'{"name": "x"}'), ("photo.png", b"\x89PNG"), (".hidden", b"x"), ("talk.txt", TWO),
        ("tsconfig.json", b'{\n  // of the compiler\n  "strict": true\n}'), ("points.json", b'[{"x": 1}, {"x": 2}]'),
        ("labels.json", b'["a", "b"]'), ("wide.txt", "abc".encode("utf-16")), ("inner/todo.txt", "[] buy milk"),
    ):  # fmt: skip
        write(folder, name, gzip.compress(TWO) if name.endswith("gz") else content)
    sources = open_sources([folder])
    assert capsys.readouterr().err == "raw: left out 6 files of other kinds (.json, .png, .txt)\n"
    assert [source.name for source in sources] == ["raw", "d.json", "e.JSON.gz", "c.ndjson", "talk.txt"]
    assert [source.count() for source in sources] == [3] + [2] * 4
    assert [record.text for record in Reading(sources[0]).records()] == ["abc", "x = 1", "[] buy milk"]
