"""Reports: one file that opens anywhere, in which every token is text, and comparisons that a CI can use."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from paceline.spec import cli
from paceline.spec.bench.runfile import read_run
from paceline.spec.bench.token_chips import chips, visible

from support import runs

HOSTILE = [
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'\"&<b>", "\u202eevil\u2066",
    "\x00\x1b[31m", "\ud800", "x" * 10_000, "{{ 7 * 7 }}", "|a|b|", "\u200b\u2028\n",
]  # fmt: skip


class Outline(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "rect", "line", "circle", "polygon", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def render(tmp_path, *paths):
    assert cli.main(["report", *map(str, paths), "-o", str(tmp_path / "out.html")]) == 0
    return (tmp_path / "out.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_in_order_with_real_tables_and_titled_pictures(tmp_path):
    page = render(tmp_path, runs.write(tmp_path / "r.jsonl", lines=runs.records(24)))
    outline = Outline(page)
    assert len(page.encode()) < 500_000
    assert not re.search(r"https?:|<script|@import|url\(", page), "nothing is fetched, nothing runs"
    assert outline.open == [], "every element is closed"
    names = [tag for tag, _ in outline.tags]
    assert (
        names.count("svg") == 6 == sum(own.get("role") == "img" and own["aria-label"] != "" for _, own in outline.tags)
    )
    assert names.count("table") >= 5 and all("scope" in own for tag, own in outline.tags if tag == "th")
    order = [
        "times plain decoding [", "Speed-up by method", "by ngram", "Methods, all prompts", "Set-up",
        "Speed by category", "Tokens per step",
        "Acceptance by depth", "depth and rank", "The drafted tree", "Where the time goes", "Token by token",
        "Memory", "Definitions",
    ]  # fmt: skip
    places = [outline.text.index(title, outline.text.index("Set-up") if n > 3 else 0) for n, title in enumerate(order)]
    assert places == sorted(places)
    assert "output identical on 24/24 texts" in outline.text and "would keep 97 %" in outline.text


def test_the_command_ends_with_the_number_to_quote(tmp_path, capsys):
    render(tmp_path, runs.write(tmp_path / "r.jsonl", lines=runs.records(24)))
    verdict, beside, written = capsys.readouterr().out.splitlines()
    assert re.match(r"\d\.\d\d times plain decoding \[.*\] with ngram: 24 prompts, tiny in float32 on a CPU", verdict)
    assert "output identical on 24/24 texts" in beside and written == f"written: {tmp_path / 'out.html'}"


def test_one_category_has_one_row(tmp_path, capsys):
    lines = [replace(record, category="all") for record in runs.records(4)]
    assert cli.main(["report", str(runs.write(tmp_path / "r.jsonl", lines=lines)), "--markdown", "-"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| together |") == 2 and "| all |" not in shown and "mean of categories" not in shown


def test_the_first_table_has_a_row_for_each_method(tmp_path, capsys):
    path = runs.write(tmp_path / "r.jsonl", lines=runs.records(24))
    assert cli.main(["report", str(path), "--markdown", "-", "--json", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("| method |")))
    plain, drafted = (line.strip("| ").split(" | ") for line in lines[first + 2 : first + 4])
    assert plain[0] == "ar" and plain[1] == "1.00" and plain[3:] == ["–"] * 4
    own = read_run(path).of("ngram")
    tokens = sum(len(record.tokens) for record in own)
    assert drafted[:2] == ["ngram", f"{tokens / sum(len(record.events) for record in own):.2f}"]
    assert drafted[2] == f"{tokens / sum(record.seconds for record in own):.1f}" and drafted[-1] == "24 / 24"
    assert drafted[3].startswith(
        f"{json.loads((tmp_path / 'r.json').read_text())['methods'][1]['speedup']['value']:.2f}×"
    )


def test_hostile_text_is_shown_and_never_interpreted(tmp_path):
    pieces = {str(token): HOSTILE[token % len(HOSTILE)] for token in range(60)}
    made = [replace(r, category=HOSTILE[0], prompt=f"{HOSTILE[1]} {r.prompt}") for r in runs.records(4, pieces=pieces)]
    head = runs.header(model=HOSTILE[2])
    head["command"] = HOSTILE[3] + HOSTILE[6]
    path = runs.write(tmp_path / "r.jsonl", head, made)
    page = render(tmp_path, path)
    outline = Outline(page)
    assert not {"script", "img", "b"} & {tag for tag, _ in outline.tags} and outline.open == []
    assert not any(name.startswith("on") for _, own in outline.tags for name in own)
    assert not re.search("[\x00-\x08\x0b-\x1f\u200b\u202a-\u202e\u2066-\u2069\u2028\ud800]", page)
    for shown in ("</script><script>", "⟨U+202E⟩evil", "⟨U+0000⟩", "⟨U+D800⟩", "(10000 characters)", "{{ 7 * 7 }}"):
        assert shown in outline.text, shown
    assert (
        cli.main(["report", str(path), "--markdown", str(tmp_path / "r.md"), "--json", str(tmp_path / "r.json")]) == 0
    )
    table = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "<script" not in table and "\u202e" not in table
    assert json.loads((tmp_path / "r.json").read_text())["best"] == "ngram"


def test_the_command_is_shown_whole(tmp_path):
    head = runs.header()
    head["command"] = "paceline bench p.jsonl --methods " + " ".join(f"drafter-{n}" for n in range(40))
    assert head["command"] in Outline(render(tmp_path, runs.write(tmp_path / "r.jsonl", head, runs.records(4)))).text


def test_what_cannot_be_seen_is_spelt_out():
    assert visible("a\tb\u202e\ud800 é\n") == "a⟨U+0009⟩b⟨U+202E⟩⟨U+D800⟩ é↵\n"
    assert len(visible("y" * 10_000)) < 200


def test_the_token_trace_is_the_text(tmp_path):
    run = read_run(runs.write(tmp_path / "r.jsonl"))
    for record in run.of("ngram")[:3]:
        shown = [chip.text for chip in chips(record) if chip.kind != "rejected"]
        assert shown == [f" w{token}" for token in record.tokens]
        kinds = [chip.kind for chip in chips(record)]
        assert kinds.count("accepted") == sum(len(event.accepted) for event in record.events)


def test_several_runs_stand_side_by_side(tmp_path):
    a, b = (runs.write(tmp_path / f"{n}.jsonl", lines=runs.records(8, seed=s)) for n, s in (("a", 1), ("b", 2)))
    text = Outline(render(tmp_path, a, b)).text
    assert all(label in text for label in ("a.jsonl: ngram", "b.jsonl: ngram", "a.jsonl: ar"))


def test_unequal_runs_and_missing_files_end_in_a_sentence(tmp_path, capsys):
    a = runs.write(tmp_path / "a.jsonl")
    b = runs.write(tmp_path / "b.jsonl", runs.header(dtype="bfloat16"))
    for command in (["report", str(a), str(b)], ["compare", str(a), str(b)]):
        assert cli.main(command) == 2
        assert "dtype = 'float32'" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert cli.main(["report", str(a), "-o", str(tmp_path / "no" / "out.html")]) == 2
    assert "choose another place" in capsys.readouterr().err


def test_a_cut_run_is_reported_with_a_warning(tmp_path, capsys):
    path = runs.write(tmp_path / "r.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    page = render(tmp_path, path)
    assert "left out 1 lines" in capsys.readouterr().err and "Incomplete:" in page


def test_compare_ends_with_1_where_b_is_worse_beyond_noise(tmp_path, capsys):
    a = runs.write(tmp_path / "a.jsonl", lines=runs.records(20))
    slow = runs.write(tmp_path / "slow.jsonl", lines=runs.records(20, slower=1.5))
    assert cli.main(["compare", str(a), str(a)]) == 0
    assert "1.00x [1.00, 1.00]" in capsys.readouterr().out
    assert cli.main(["compare", str(a), str(slow)]) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "speed-up" in line)
    assert "worse" in row and float(re.search(r"([\d.]+)x", row)[1]) == pytest.approx(1 / 1.5, abs=0.01)
    assert cli.main(["compare", str(slow), str(a)]) == 0
    assert "better" in capsys.readouterr().out
