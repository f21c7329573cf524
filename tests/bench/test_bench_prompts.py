"""The prompts of a bench: what is read, and that what cannot be read is named with the remedy."""

import pytest
from paceline.spec.data.sources import open_source
from paceline.spec.prompts import read_bench_prompts

GOOD = '{"prompt": "one"}\n'


def read(tmp_path, text, most=None):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_bench_prompts(open_source(path), most)


def test_prompts_turns_and_empty_lines(tmp_path):
    prompts = read(tmp_path, GOOD + '\n{"turns": ["a", "b"], "id": "x", "category": "talk"}\n')
    assert [(p.id, p.category, p.turns) for p in prompts] == [("1", "all", ("one",)), ("x", "talk", ("a", "b"))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "two', "no JSON (Unterminated string"),
        ('{"text": "two", "n": 1}', "it is a text and no prompt"),
        ("{}", "it is of no known form (it has nothing)"),
        ("[1]", "'messages' is no list of messages"),
        ("3", "it is a JSON number and no object"),
        ("Why is the sky blue?", "no JSON (Expecting value, column 1)"),
        ('{"prompt": " "}', "a user turn is empty"),
        ('{"turns": []}', "'turns' is no list of a user's texts"),
        ('{"turns": "two"}', "'turns' is no list of a user's texts"),
        (b"\xff\xfe", "it is no text in UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_left_out_and_named(tmp_path, line, words, capsys):
    line = line if isinstance(line, bytes) else line.encode()
    assert [prompt.turns for prompt in read(tmp_path, GOOD.encode() + line)] == [("one",)]
    said = capsys.readouterr().err
    assert "p.jsonl: read as prompts, 1 of 2 records\n  left out 1, in line 2: " + words in said
    with pytest.raises(ValueError) as caught:
        read(tmp_path, b"\n" + line + b"\n" + line)
    assert "none of its 2 records can be used (2, the first in line 2: " + words in str(caught.value)
    assert str(caught.value).endswith('such as {"prompt": "Why is the sky blue?"}, or name their fields by --columns')


def test_what_is_wrong_with_the_whole_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="id 7 stands in several lines"):
        read(tmp_path, '{"prompt": "one", "id": 7}\n' * 2)
    with pytest.raises(ValueError, match="holds no records; each line"):
        read(tmp_path, "\n")
    with pytest.raises(ValueError, match=r"none.jsonl does not exist; give a file"):
        read_bench_prompts(open_source(tmp_path / "none.jsonl"))
