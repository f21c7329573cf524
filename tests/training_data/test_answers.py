"""Answers of the target: every prompt accounted for, every answer what `generate` gives, runs that go on."""

import paceline
import pytest
import torch
from paceline.training.data.ledger import job_seed
from paceline.training.records import Journal

from support.data_runs import ENDS, PROMPTS, generate, lines, write

BAD = [{"prompt": ""}, {"question": "?"}, "{broken", {"turns": []}, {"prompt": "ABC"}, {"prompt": "A" * 125}]


def test_every_prompt_is_accounted_for(folder, chat, tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", PROMPTS + BAD)
    out = tmp_path / "out.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0,0.8", "--repeats", "2", "--max-new-tokens", 4) == 0
    assert "12 done + 0 failed + 18 skipped = 30 asked for" in capsys.readouterr().out
    records, problems = lines(out), lines(tmp_path / "out.problems.jsonl")
    assert len({record["id"] for record in records}) == 12 and len({p["id"] for p in problems}) == 18
    reasons = {problem["reason"].split(" ")[0] for problem in problems}
    assert {"no", "it", "the", "a"} <= reasons and any("context is 128" in p["reason"] for p in problems)
    assert {record["source"] for record in records} == {"p", "other"}
    for record in records:
        assert [m["role"] for m in record["messages"] if m["role"] != "system"][:2] == ["user", "assistant"]
        assert record["tokens"] == sum(map(len, record["token_ids"])) and record["seed"] == job_seed(0, record["id"])
    assert any(record["finished"] for record in records) and not all(record["finished"] for record in records)


def test_an_answer_is_what_generate_gives(folder, chat, tmp_path):
    model, _ = paceline.load_target(folder)
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / "p.jsonl", PROMPTS)
    assert generate(folder, source, "-o", out, "--temperatures", "0,0.8", "--top-p", "0.9") == 0
    two_turns = 0
    for record in lines(out):
        sampling = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=0)
        sampling = sampling if record["temperature"] else dict(do_sample=False)
        answers = [i for i, message in enumerate(record["messages"]) if message["role"] == "assistant"]
        two_turns += len(answers) == 2
        for place, own in zip(answers, record["token_ids"]):
            before = record["messages"][:place]
            ids = chat.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            ids = ids["input_ids"]
            options = dict(max_new_tokens=9, seed=[record["seed"]], **sampling)
            truth = paceline.generate(model, ids, torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
            assert own == truth
            text = chat.decode(own[:-1] if own[-1] in ENDS else own, skip_special_tokens=True)
            assert record["messages"][place]["content"] == text
    assert two_turns, "a second turn must occur"


def test_a_second_run_adds_nothing_and_a_torn_line_is_made_again(folder, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "out.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0.8") == 0
    whole = out.read_bytes()
    assert generate(folder, source, "-o", out, "--temperatures", "0.8") == 0
    assert out.read_bytes() == whole
    out.write_bytes(whole[: len(whole) // 2])
    assert generate(folder, source, "-o", out, "--temperatures", "0.8") == 0
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    write(tmp_path / "p.jsonl", [{"prompt": "NEW"}, *PROMPTS])  # data may grow
    assert generate(folder, source, "-o", out, "--temperatures", "0.8") == 0
    assert len(lines(out)) == len(PROMPTS) + 1


def test_a_run_with_other_settings_is_refused(folder, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", PROMPTS[:1]), tmp_path / "out.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0") == 0
    assert generate(folder, source, "-o", out, "--temperatures", "0", "--top-p", "0.5") == 2
    assert "top_p=0.95 and is now to go on with 0.5" in capsys.readouterr().err
    assert generate(folder, source, "-o", out, "--temperatures", "0", "--seed", "3") == 2


def test_a_run_without_a_result_leaves_nothing_and_binds_nobody(folder, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", PROMPTS[:1]), tmp_path / "new" / "out.jsonl"
    for mistyped in (["--model", folder + "x"], ["--drafter", "./nothing"], ["--tree", "tall", "--drafter", "ngram"]):
        assert generate(folder, source, "-o", out, *mistyped) == 2
        read, said = capsys.readouterr().err.splitlines()
        assert read == "p.jsonl: read as prompts, 1 of 1 records" and said.startswith("paceline: ")
        assert not out.parent.exists()
    assert generate(folder, source, "-o", out, "--temperatures", "0") == 0
    assert len(lines(out)) == 1


def test_every_output_has_files_of_its_own(folder, tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", PROMPTS[:1])
    for number, name in enumerate(("ans.v1", "ans.v2", "ans.jsonl")):
        assert generate(folder, source, "-o", tmp_path / name, "--temperatures", "0", "--seed", number) == 0
        assert len(lines(tmp_path / name)) == 1
    made = {path.name for path in tmp_path.iterdir() if path.name.endswith(".run.json")}
    assert made == {"ans.v1.run.json", "ans.v2.run.json", "ans.run.json"}
    capsys.readouterr()
    assert generate(folder, source, "-o", tmp_path / "ans") == 2
    assert "ans.run.json is of ans.jsonl; give the output another name" in capsys.readouterr().err
    assert not (tmp_path / "ans").exists()


def test_the_limit_of_tokens_leaves_the_rest_for_later(folder, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", [{"prompt": "AB" + chr(67 + i)} for i in range(20)]), tmp_path / "o.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0", "--limit-tokens", "30") == 0
    text = capsys.readouterr().out
    assert "left by the limit" in text
    assert 30 <= sum(record["tokens"] for record in lines(out)) < 30 + 3 * 9 + 9
    assert generate(folder, source, "-o", out, "--temperatures", "0") == 0
    assert len(lines(out)) == 20


def test_a_journal_cuts_a_torn_line_only(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add({"a": "ü"})
        journal.add({"b": 1})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            assert len(journal.records) == whole[:cut].count(b"\n")
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1: no JSON"):
        Journal(path)


def test_the_comparison_with_transformers_prints_a_ratio(folder, tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", PROMPTS)
    assert generate(folder, source, "--temperatures", "0", "--compare-transformers") == 0
    last = capsys.readouterr().out.splitlines()
    assert last[-2].split()[0] == "together" and last[-2].endswith("x") and "4 prompts, batch 3" in last[-1]
