"""The prompts file of a bench: what is read, and that a line which cannot be read is named with the remedy."""

import pytest
from paceline.spec.prompts import read_bench_prompts

GOOD = '{"prompt": "one"}\n'


def read(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_bench_prompts(str(path))


def test_prompts_turns_and_empty_lines(tmp_path):
    prompts = read(tmp_path, GOOD + '\n{"turns": ["a", "b"], "id": "x", "category": "talk"}\n')
    assert [(p.id, p.category, p.turns) for p in prompts] == [("1", "all", ("one",)), ("x", "talk", ("a", "b"))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD * 2 + '{"prompt": "two\n', 'p.jsonl, line 3 is no JSON .* such as {"prompt": '),
        (GOOD + '\n{"text": "two", "n": 1}\n', "line 3 has text, n; a prompt is a line such as"),
        (GOOD + "{}\n", "line 2 has nothing; a prompt is"),
        (GOOD + "[1]\n", "line 2 is a list; a prompt is"),
        ("Why is the sky blue?\n", "line 1 is no JSON"),
        (GOOD + '{"prompt": ""}\n', "line 2 has an empty prompt"),
        (GOOD + '{"turns": []}\n', "line 2 has an empty prompt"),
        (GOOD + '{"turns": "two"}\n', "line 2 has an empty prompt, or one that is no text"),
        ('{"prompt": "one", "id": 7}\n' * 2, "id 7 stands in several lines"),
        ("\n", "holds no prompts; each line"),
        (b"\xff\xfe", "cannot be read .it is no text in UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_no_malformed_file(tmp_path):
    with pytest.raises(ValueError, match=r"prompts file .*none.jsonl cannot be read \(No such file"):
        read_bench_prompts(str(tmp_path / "none.jsonl"))
