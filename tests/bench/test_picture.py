"""The picture of some steps: each tree whole, each token in its kind, the text that they make, and nothing else."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from paceline.spec import cli
from paceline.spec.bench.picture import NODES, STEPS, nodes, picture, typical
from paceline.spec.bench.runfile import read_run
from paceline.spec.trace import Event

from support import runs

SVG = "{http://www.w3.org/2000/svg}"


def make(tmp_path, *arguments):
    assert cli.main(["report", *map(str, arguments), "--picture", str(tmp_path / "p.svg")]) == 0
    return (tmp_path / "p.svg").read_text(encoding="utf-8")


@pytest.fixture
def path(tmp_path):
    return runs.write(tmp_path / "r.jsonl", lines=runs.records(8))


def kinds(svg, of="tree"):
    """How many boxes of each kind there are in the trees or in the text."""
    root = ElementTree.fromstring(svg)
    text = root.find(f"{SVG}g[@class='text']")
    boxes = [own for own in (text if of == "text" else root) if own.tag == f"{SVG}rect"]
    found = [own.get("class") for own in boxes]
    return {kind: found.count(kind) - (of == "tree") for kind in ("root", "accepted", "bonus", "rejected")}


def test_trees_and_text_are_those_of_the_steps(tmp_path, path):
    svg = make(tmp_path, path)
    run = read_run(path)
    record = run.of("ngram")[0]
    every = [event for other in run.of("ngram") for event in other.events]
    first = typical(record.events, sum(len(event.committed) for event in every) / len(every))
    events = record.events[first : first + STEPS]
    accepted, own = sum(len(event.accepted) for event in events), sum(event.bonus is not None for event in events)
    drafted = sum(event.drafted for event in events)
    assert kinds(svg) == {"root": STEPS, "accepted": accepted, "bonus": own, "rejected": drafted - accepted}
    assert kinds(svg, "text") == {"root": 0, "accepted": accepted, "bonus": own, "rejected": 0}
    root = ElementTree.fromstring(svg)
    shown = [own.text for own in root.find(f"{SVG}g[@class='text']").iter(f"{SVG}text") if not own.get("class")]
    assert shown == [f"w{token}" for event in events for token in event.committed]
    assert f"step {first + 1}: {len(events[0].accepted)} of {events[0].drafted} accepted" in svg


def test_it_is_one_accessible_file_that_needs_nothing(tmp_path, path):
    svg = make(tmp_path, path)
    assert svg == make(tmp_path, path), "the same run file gives the same picture"
    root = ElementTree.fromstring(svg)
    named = {own.get("id"): own.text for own in root if own.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.get("role") == "img" and root.get("aria-labelledby").split() == list(named)
    assert named["title"].startswith("tiny with ngram, prompt p0, steps ") and named["desc"].count("Step ") == STEPS
    assert "prefers-color-scheme: dark" in svg and len(svg.encode()) < 60_000 and root.get("width") == "900"
    assert not re.search(r"<script|@import|url\(|href|<image", svg)
    for own in root.iter(f"{SVG}rect"):
        assert float(own.get("x")) + float(own.get("width")) <= 900


def test_the_steps_are_neither_the_best_nor_the_worst():
    events = [Event(0, step, [1] * 6, [-1, 0, 1, 2, 3, 4], list(range(1, taken + 1)), 1) for step, taken in enumerate(
        [5, 5, 5, 5, 0, 0, 0, 0, 1, 1, 2, 0, 1, 1])]  # fmt: skip
    assert typical(events, 2.0) == 7 and typical(events, 6.0) == 0 and typical(events, 1.0) == 4
    assert typical(events[:2], 1.0) == 0


def test_a_large_tree_is_cut_and_its_path_is_not(tmp_path):
    record = runs.records(1)[1]
    parents = [-1, *(node // 2 for node in range(1, 256))]
    path, node = [], 255
    while node:
        path, node = [node, *path], parents[node]
    event = Event(0, 0, list(range(256)), parents, path, 7)
    made = nodes(record, event)
    assert [node.kind for node in made].count("accepted") == len(path) == 8 and made[-1].kind == "bonus"
    assert len(made) == NODES + 2 and all(node.parent < place for place, node in enumerate(made))
    assert made[made[-1].parent].kind == "accepted"
    svg = picture(replace(record, events=[event] * 4), 9.0, "large")
    assert "8 of 255 accepted, 231 not shown" in svg and len(svg.encode()) < 60_000


def test_places_left_empty_and_a_text_that_ends_inside_a_step():
    record = runs.records(1)[1]
    made = nodes(record, Event(0, 0, [1, 2, -1, 3, 4], [-1, 0, 0, 1, 2], [1, 3], None))
    assert [node.kind for node in made] == ["root", "accepted", "accepted"], "nothing stands behind an empty place"


def test_text_of_any_kind_is_only_shown(tmp_path):
    pieces = {
        str(token): text
        for token, text in zip(range(60), ["</text><script>", "\u202eevil", "\x00", "&", "x" * 999] * 12)
    }
    path = runs.write(tmp_path / "r.jsonl", runs.header(model='"><b>'), runs.records(3, pieces=pieces))
    svg = make(tmp_path, path)
    ElementTree.fromstring(svg)
    assert "<script" not in svg and "<b>" not in svg and "\u202e" not in svg and "\x00" not in svg
    for own in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        assert float(own.get("x")) + float(own.get("width")) <= 900


def test_without_plain_decoding_there_is_a_picture_and_without_a_drafter_a_sentence(tmp_path, capsys):
    made = runs.records(4)
    alone = runs.write(tmp_path / "a.jsonl", lines=[record for record in made if record.method == "ngram"])
    assert "tiny with ngram" in make(tmp_path, alone)
    plain = runs.write(tmp_path / "b.jsonl", lines=[record for record in made if record.method == "ar"])
    assert cli.main(["report", str(plain), "--picture", str(tmp_path / "p.svg")]) == 2
    assert "has no text of a drafter to draw" in capsys.readouterr().err
