"""Run files: what is written is read, and what was cut, mixed or doubled is counted and left out."""

import json
from dataclasses import replace

import pytest
from paceline.spec.bench.runfile import Difference, RunWriter, read_run

from support import runs


def test_what_is_written_is_read(tmp_path):
    path, made = tmp_path / "r.jsonl", runs.records()
    made[1] = replace(made[1], identical=False, difference=Difference(3, 0.01, 0.02), pieces={"3": "\ud800\n"})
    writer = RunWriter(path, runs.header())
    for record in made:
        writer.append([record])
    writer.close()
    run = read_run(path)
    assert run.header == runs.header() and run.warning is None
    for record in run.records:
        for event in record.events:
            event.group = ""
            event.seconds = {phase: pytest.approx(seconds) for phase, seconds in event.seconds.items()}
    assert run.records == made
    assert run.of("ngram") == made[1::2]


def test_a_file_cut_anywhere_gives_its_complete_part_and_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    whole = runs.write(path).read_bytes()
    first, *lines = whole.splitlines(keepends=True)
    for cut in (len(first) + len(lines[0]), len(first) + len(lines[0]) + 7, len(whole) - 1):
        path.write_bytes(whole[:cut])
        run = read_run(path)
        complete = whole[:cut].count(b"\n") - 1
        assert len(run.records) == complete
        assert (run.warning is None) == whole[:cut].endswith(b"\n")
        writer = RunWriter(path, runs.header())
        assert len(writer.done) == complete
        writer.append(runs.records()[complete:])
        writer.close()
        assert path.read_bytes() == whole


def test_half_a_batch_does_not_count(tmp_path):
    path = tmp_path / "r.jsonl"
    pair = [replace(record, batch=0, rows=2) for record in runs.records() if record.method == "ar"][:2]
    alone = replace(runs.records()[5], batch=5)
    runs.write(path, lines=[alone, pair[0]])
    run = read_run(path)
    assert len(run.records) == 1 and "1 of incomplete batches" in run.warning
    writer = RunWriter(path, runs.header())
    assert [record.batch for record in writer.done] == [5]
    writer.append(pair)
    writer.close()
    assert len(read_run(path).records) == 3 and read_run(path).warning is None


def test_mixed_and_doubled_lines_are_left_out_and_counted(tmp_path):
    path, made = tmp_path / "r.jsonl", [record.line() for record in runs.records()]
    other = json.dumps({**runs.header(), "version": 2}) + "\n"
    path.write_text(json.dumps(runs.header()) + "\n" + "".join(made[:3]) + made[1] + "{}\n[1]\n" + other + made[4])
    run = read_run(path)
    assert len(run.records) == 3
    assert run.left_out == {
        "written twice": 1,
        "cut or damaged": 2,
        "further headers": 1,
        "of another run or version": 1,
    }
    assert "left out 5 lines" in run.warning


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"\xff\xfe", "does not begin with the header"),
        (b'{"a": 1}\n', "does not begin with the header"),
        (b"[]\n", "does not begin with the header"),
        (json.dumps({**runs.header(), "version": 7}).encode() + b"\n", "version 7"),
        (json.dumps(runs.header()).encode() + b"\n", "no complete measurement"),
    ],
)
def test_files_that_are_no_runs_end_in_a_sentence(tmp_path, content, words):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_run(path)


def test_another_setup_is_refused_with_the_difference(tmp_path):
    path = runs.write(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with pytest.raises(ValueError, match='dtype = "float32" and now dtype = "bfloat16"'):
        RunWriter(path, runs.header(dtype="bfloat16"))
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(ValueError, match="nothing was overwritten"):
        RunWriter(tmp_path / "notes.txt", runs.header())
    assert path.read_bytes() == before and (tmp_path / "notes.txt").read_text() == "my notes"


def test_other_methods_are_refused_by_their_names(tmp_path):
    path, other = runs.write(tmp_path / "r.jsonl"), runs.header()
    other["methods"] = [*other["methods"], {**other["methods"][1], "name": "short"}]
    with pytest.raises(ValueError, match='methods = "ar, ngram" and now methods = "ar, ngram, short"'):
        RunWriter(path, other)
    other = runs.header()
    other["methods"][1]["rule"] = "typical"
    with pytest.raises(ValueError, match='method ngram: rule = "match" and now method ngram: rule = "typical"'):
        RunWriter(path, other)


def test_a_second_writer_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    writer = RunWriter(tmp_path / "r.jsonl", runs.header())
    with pytest.raises(ValueError, match="another bench"):
        RunWriter(tmp_path / "r.jsonl", runs.header())
    writer.close()
    RunWriter(tmp_path / "r.jsonl", runs.header()).close()


@pytest.mark.parametrize("left", [json.dumps(runs.header())[:50], json.dumps(runs.header(seed=7)) + "\n"])
def test_a_header_without_records_is_written_again(tmp_path, left):
    path = tmp_path / "r.jsonl"
    path.write_text(left)
    RunWriter(path, runs.header()).close()
    assert path.read_text() == left
    writer = RunWriter(path, runs.header())
    writer.append(runs.records()[:1])
    writer.close()
    assert json.loads(path.read_text().splitlines()[0]) == runs.header() and len(read_run(path).records) == 1


def test_a_bench_that_measures_nothing_leaves_no_file(tmp_path):
    RunWriter(tmp_path / "r.jsonl", runs.header()).close()
    assert not list(tmp_path.iterdir())
