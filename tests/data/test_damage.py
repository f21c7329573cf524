"""A thousand damaged files: each is read with account of every record, or refused in one sentence."""

import bz2
import gzip
import json
import lzma
import random

import pytest
from paceline.spec.data.files import Texts
from paceline.spec.data.forms import Record, record
from paceline.spec.data.reading import Reading, Unusable
from paceline.spec.data.sources import open_source
from paceline.training.data.documents import Reader

FILES = 1000
USER, ANSWER = (
    {"role": "user", "content": "Wie heißt du?\u2028\n\"'"},
    {"role": "assistant", "content": "So \U0001f600."},
)
ENTRIES = [
    {"prompt": "Why?", "id": 7, "category": "x"},
    {"turns": ["a", "b"], "source": "mine"},
    {"messages": [USER, ANSWER], "token_ids": [[1, 2, 3]], "finished": True, "temperature": 0.5},
    {"messages": [USER, {**ANSWER, "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER],
        "tools": [{"type": "function"}],
    },
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "z"},
    {"instruction": "do", "input": "this", "output": "that", "history": [["a", "b"]]},
    {"prompt": [USER], "completion": [ANSWER], "messages": None},
    {"prompt": "x", "completion": "y", "text": None},
]
JUNK = [
    None, True, False, 0, -1, 5, 1e999, 10**400, "", " ", "\ud800", "x\0y", "\u2028", [], [[]], [None], {},
    [[1000000000]], {"role": "user"}, {"from": "gpt"}, ["a", 5], [{"type": "image"}], {"text": 5}, float("nan"),
]  # fmt: skip
BYTES = [
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xc3",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"\xe2\x80\xa8",
]
BYTES += [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\xef\xbb\xbf",
    b"PAR1",
    b"\x1f\x8b",
    b"9" * 5000,
    b"NaN",
    b"\n\n",
    b"\xed\xa0\x80",
]
PACKS = [
    (bytes, bytes),
    (gzip.compress, gzip.decompress),
    (lzma.compress, lzma.decompress),
    (bz2.compress, bz2.decompress),
]


def line(draw, entry):
    return json.dumps(entry, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def replaced(draw, value):
    """The value with something in it, or all of it, of another kind."""
    if draw.random() < 0.3 or not isinstance(value, (list, dict)) or not value:
        return draw.choice(JUNK)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        return [replaced(draw, one) if number == place else one for number, one in enumerate(value)]
    chosen = draw.choice(list(value))
    if draw.random() < 0.2:
        return {("odd" if name == chosen else name): one for name, one in value.items()}
    return {name: replaced(draw, one) if name == chosen else one for name, one in value.items()}


def damaged(draw, data):
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice([0, 1, 1, 5, 40]))
        kind = draw.randrange(6)
        if kind == 0:
            data = data[:start] + bytes(draw.randrange(256) for _ in range(stop - start)) + data[stop:]
        elif kind == 1:
            data = data[:start] + data[stop:]
        elif kind in (2, 3):
            data = data[:start] + draw.choice(BYTES) + data[start:]
        elif kind == 4:
            data = data[:start] + data[start:stop] * 2 + data[stop:]
        else:
            data = data[:start]
    return data


def made(draw):
    """A file's name and bytes, before and after damage, and how it is unpacked."""
    entries = [draw.choice(ENTRIES) for _ in range(draw.randint(1, 12))]
    entries = [replaced(draw, entry) if draw.random() < 0.15 else entry for entry in entries]
    if draw.random() < 0.3:
        name, data = "a.json", json.dumps(entries, indent=draw.choice([None, 1])).encode()
    else:
        lines = [line(draw, entry) for entry in entries]
        name, data = "a.jsonl", draw.choice([b"\n", b"\n", b"\r\n"]).join(lines) + draw.choice([b"", b"\n"])
    data = draw.choice([b"", b"", b"", b"\xef\xbb\xbf"]) + data
    pack, unpack = draw.choice(PACKS[:1] * 6 + PACKS)
    if draw.random() < 0.8:
        return name, pack(damaged(draw, data)), unpack
    return name, damaged(draw, pack(data)), unpack


def expected(content, unpack, kind):
    """What is in a file, read plainly: each entry, or None for one that is none. No list where it cannot be read."""
    try:
        data = unpack(content).removeprefix(b"\xef\xbb\xbf")
        if kind == "Values":
            return plain_values(data.decode("utf-8", "surrogateescape"))
    except (EOFError, OSError, ValueError, RecursionError, lzma.LZMAError, gzip.zlib.error):
        return None
    return [parsed(one) for one in data.split(b"\n") if one.strip()]


def plain_values(text):
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        end = json.JSONDecoder().raw_decode(text.lstrip())[1]
        head, rest = text.lstrip()[:end], text.lstrip()[end:]
        return plain_values(head) + plain_values(rest)
    conversation = isinstance(value, list) and value and isinstance(value[0], dict)
    conversation = conversation and ({"role", "content"} <= value[0].keys() or {"from", "value"} <= value[0].keys())
    return value if isinstance(value, list) and not conversation else [value]


def parsed(one):
    try:
        return json.loads(one.decode())
    except (ValueError, RecursionError):
        return None


def usable(entry):
    try:
        json.dumps(entry, ensure_ascii=False).encode()
        return record(entry, 1, "", {})
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_lost_in_silence_and_nothing_ends_in_a_traceback(tmp_path, capsys, tokenizer, part):
    reader = Reader(tokenizer, frozenset([2]), 61)
    seen = {"read": 0, "refused": 0, "left out": 0}
    for number in range(part, FILES, 4):
        name, content, unpack = made(random.Random(number))
        path = tmp_path / name
        path.write_bytes(content)
        truth = None
        try:
            source = open_source(path)
            truth = expected(content, unpack, type(source).__name__)
            reading = Reading(source)
            taken = list(reading.each(lambda record: record))
        except ValueError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 500 and text.isprintable(), (number, text)
            assert not any(map(usable, truth or [])), (number, text)
            seen["refused"] += 1
            continue
        finally:
            said = capsys.readouterr().err
        assert not isinstance(source, Texts), (number, "records are never learned as text")
        assert len(taken) == source.count() == len(truth) == reading.taken + reading.left_out, number
        assert f"{reading.taken:,} of {len(truth):,} records" in said, number
        assert sum(int(one.split()[2].strip(",")) for one in said.splitlines()[1:]) == reading.left_out, (number, said)
        for one, entry in zip(taken, truth):
            known = usable(entry) if entry is not None else None
            assert isinstance(one, Record if known else Unusable), (number, entry, one)
            assert not known or (one.messages, one.text, one.token_ids) == (known.messages, known.text, known.token_ids)
        records = [one for one in taken if isinstance(one, Record)]
        documents = {record.number: made for record, made in reader.documents(records)}
        assert documents.keys() == {record.number for record in records}, "each has documents, or a reason for none"
        seen["read"] += 1
        seen["left out"] += reading.left_out
    assert min(seen.values()) > 20, seen
