"""Prompts: read from files and data sets, invented by the target, kept out, refused."""

import paceline
import pytest
import torch
from paceline.training.data.answers import _said
from paceline.training.data.ledger import job_seed
from paceline.training.data.prompts import Prompt, Unusable, prompt_entries, sift, turns_of
from transformers import PreTrainedTokenizerFast

from support.data_runs import ENDS, PROMPTS, generate, lines, write
from support.models import tiny_llama


def test_the_target_invents_prompts(folder, tmp_path, capsys):
    out = tmp_path / "self.jsonl"
    assert generate(folder, "--source", "self", "--count", 12, "-o", out, "--temperatures", "0,1.0") == 0
    text = capsys.readouterr().out
    assert "= 24 asked for" in text
    turns = lines(tmp_path / "self.turns.jsonl")
    assert len(turns) == 12 and {turn["id"] for turn in turns} == set(range(12))
    usable = {turn["turn"] for turn in turns if turn["turn"]}
    records = lines(out)
    assert {record["messages"][0]["content"] for record in records} == usable and len(records) == 2 * len(usable)
    assert all(record["source"] == "self" for record in records) and len(usable) > 1


def test_invented_turns_go_on_from_their_beginnings(folder, tmp_path, capsys):
    """Each beginning in its turn; the target's own words behind it, the same as it would say there unasked."""
    begin = tmp_path / "begin.txt"
    begin.write_text("AB\n\nHEAD  \n")
    out = tmp_path / "self.jsonl"
    line = ["--source", "self", "--beginnings", begin, "-o", out, "--temperatures", "0"]
    assert generate(folder, "--count", 5, *line) == 0
    turns = {turn["id"]: turn for turn in lines(tmp_path / "self.turns.jsonl")}
    assert sorted(turns) == [0, 1, 2, 3, 4] and any(turn["turn"] for turn in turns.values())
    model, tokenizer = paceline.load_target(folder, torch.float32, "cpu")
    for number, turn in turns.items():
        begun = ["AB", "HEAD"][number % 2]
        prompt = tokenizer("u" + begun, add_special_tokens=False, return_tensors="pt")["input_ids"]
        options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 9}
        said = paceline.generate(model, prompt, seed=job_seed(0, f"self/{number}"), **options)[0, prompt.shape[1] :]
        ended = int(said[-1]) in ENDS
        assert turn["ended"] == ended
        words = tokenizer.decode(said[:-1], skip_special_tokens=True)
        assert turn["turn"] == ((begun + words).strip() if ended and words.strip() else "")
    assert generate(folder, "--count", 5, "--source", "self", "-o", out, "--temperatures", "0") == 2
    assert "was begun with beginnings=['AB', 'HEAD']" in capsys.readouterr().err


def test_the_space_behind_a_beginning_stays():
    """Also where a decoder, like Llama 2's, takes the space off the start of what it is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"\u2581Who": 0, "\u2581was": 1, "\u2581first": 2, "?": 3}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert backend.decode([2, 3]) == "first?", "as such decoders do"
    assert _said(backend, [0, 1], [2, 3]) == " first?" and _said(backend, [0, 1], []) == ""


def test_prompts_of_an_exclusion_file_are_left_out(folder, tmp_path, capsys, root):
    bench = write(tmp_path / "bench.jsonl", [{"turns": ["first", "  gH "]}, {"prompt": "xyz"}])
    source = write(tmp_path / "p.jsonl", PROMPTS)
    assert generate(folder, source, "-o", tmp_path / "o.jsonl", "--temperatures", "0", "--exclude", bench) == 0
    assert "3 done + 0 failed + 1 skipped = 4" in capsys.readouterr().out
    assert not [r for r in lines(tmp_path / "o.jsonl") if r["messages"][0]["content"] == "DEF"]
    real = root / "tests" / "spec_bench_24.jsonl"
    held_out = list(prompt_entries(str(real)))
    sifted = list(sift([*held_out, Prompt(("Something of my own.",), None, "mine")], turns_of(str(real))))
    assert [entry for entry in sifted if isinstance(entry, Prompt)] == [Prompt(("Something of my own.",), None, "mine")]
    assert all("excluded" in entry.reason for entry in sifted if isinstance(entry, Unusable)) and len(held_out) == 24


def test_a_data_set_on_disk_is_a_source(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"prompt": "ABC"}, {"prompt": "DEF"}]).save_to_disk(tmp_path / "set")
    assert [prompt.turns for prompt in prompt_entries(str(tmp_path / "set"))] == [("ABC",), ("DEF",)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a file or data set"),
        (["p.jsonl", "--source", "self"], "either a file or data set"),
        (["nowhere.jsonl", "-o", "o.jsonl"], "nowhere.jsonl does not exist; give a file"),
        (["nowhere", "-o", "o.jsonl"], "no file, and no data set"),
        (["p.jsonl"], "-o FILE"),
        (["p.jsonl", "-o", "o.jsonl", "--temperatures", "hot"], "no list of numbers"),
        (["p.jsonl", "-o", "o.jsonl", "--top-p", "0"], "not above 0"),
        (["empty.jsonl", "-o", "o.jsonl"], "holds no records"),
        (["p.jsonl", "-o", "p.jsonl"], "p.jsonl is read by this command"),
        (["p.jsonl", "-o", "notes"], "which says how it was made"),
        (["p.jsonl", "-o", "o.jsonl", "--server", "localhost"], "is no URL"),
        (["--source", "self", "-o", "o.jsonl", "--server", "http://localhost"], "answers prompts only"),
        (["p.jsonl", "-o", "o.jsonl", "--beginnings", "p.jsonl"], "add --source self"),
        (["--source", "self", "-o", "o.jsonl", "--beginnings", "empty.jsonl"], "holds no beginnings"),
        (["--source", "self", "-o", "o.jsonl", "--beginnings", "nowhere.txt"], "cannot be read"),
    ],
)
def test_bad_input_ends_in_one_sentence(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", PROMPTS)
    write(tmp_path / "empty.jsonl", [])
    (tmp_path / "notes").write_text("mine, without a line break")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert generate(folder, *arguments) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("paceline: ") and words in error


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, tokenizer, capsys):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    tiny_llama().save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    source = write(tmp_path / "p.jsonl", PROMPTS)
    assert generate(str(tmp_path / "bare"), source, "-o", tmp_path / "o.jsonl") == 2
    assert "no chat template" in capsys.readouterr().err
