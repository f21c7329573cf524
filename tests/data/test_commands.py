"""Every command takes the same files; ids and lengths are looked at before anything is decoded or trained."""

import gzip
import io
import json
import sys

import datasets
import pytest
from paceline.spec import cli
from paceline.spec.bench.runfile import read_run
from paceline.training.data.rows import check_rows, open_data

from support.data_runs import TEMPLATE, lines
from support.models import tiny_llama
from support.training_runs import random_rows, write_data

pytestmark = pytest.mark.usefixtures("one_thread")
KNOWN = 57  # ids that the target knows: the tokenizer gives 61


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    import copy

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab=KNOWN, max_position_embeddings=64, seed=4).save_pretrained(path)
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    made.save_pretrained(path)
    return str(path)


def chat(text):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "DEF"}], "id": f"chat {text}"}


GOOD = [chat(text) for text in ("ABC\u2028", "BCDE", "CDEF")]
ODD = [chat("z"), chat("A" * 60), {"conversations": None}, {"prompt": "x", "token_ids": 5}]


@pytest.fixture
def file(tmp_path):
    """An array of chats, packed, of which some are odd."""
    path = tmp_path / "chats.json.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD + ODD, ensure_ascii=False).encode()))
    return str(path)


LEFT_OUT = [
    "left out 1 prompts: it has a token id beyond the model's vocabulary of 57",
    "left out 1 prompts: it does not fit into the model's context of 64 with 8 new tokens",
]
READ = "chats.json.gz: read as ShareGPT, 5 of 7 records"


@pytest.mark.parametrize("command", ["bench", "evaluate", "plan"])
def test_chats_are_measured_on_and_odd_ones_left_out(folder, file, tmp_path, capsys, command):
    out = tmp_path / "out.json"
    line = {
        "bench": ["bench", file],
        "evaluate": ["evaluate", "ngram", "--prompts", file],
        "plan": ["plan", "--drafter", "ngram", "--calibrate", file],
    }[command]
    assert cli.main([*line, "-o", str(out), "--model", folder, "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr().err
    assert said.count(READ) == 1 and all(said.count(reason) == 1 for reason in LEFT_OUT)
    if command == "bench":
        assert {record.prompt for record in read_run(out).records} == {entry["id"] for entry in GOOD}
    if command == "evaluate":
        about = json.loads(out.read_text())
        assert about["measured"]["prompts"] == 3 and about["how"]["prompts"]["file"] == "chats.json.gz"


@pytest.mark.parametrize("command", ["bench", "evaluate", "plan", "data generate"])
def test_columns_name_what_the_prompts_are(folder, tmp_path, capsys, command):
    datasets.Dataset.from_list([{"question": text} for text in ("ABC", "BCD")]).to_parquet(tmp_path / "q.parquet")
    file, out = str(tmp_path / "q.parquet"), str(tmp_path / "out")
    line = {
        "bench": ["bench", file],
        "evaluate": ["evaluate", "ngram", "--prompts", file],
        "plan": ["plan", "--drafter", "ngram", "--calibrate", file],
        "data generate": ["data", "generate", file, "--temperatures", "0", "--executor", "eager"],
    }[command]
    line += ["-o", out, "--model", folder, "--max-new-tokens", "8"]
    assert cli.main(line) == 2
    assert "none of its 2 records can be used (2, the first in row 1: it is of no known form (it has question))" in (
        capsys.readouterr().err
    )
    assert cli.main([*line, "--columns", "promt=question"]) == 2
    assert "'promt=question' is no FIELD=COLUMN" in capsys.readouterr().err
    assert cli.main([*line, "--columns", "prompt=question"]) == 0
    assert "q.parquet: read as prompts, 2 of 2 records" in capsys.readouterr().err


def test_what_cannot_be_answered_is_accounted_for(folder, file, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    line = ["data", "generate", file, "-o", str(out), "--model", folder, "--max-new-tokens", "8", "--temperatures", "0"]
    assert cli.main([*line, "--executor", "eager"]) == 0
    told = capsys.readouterr()
    assert READ in told.err and "3 done + 0 failed + 4 skipped = 7 asked for" in told.out
    reasons = {problem["id"].split("/")[0]: problem["reason"] for problem in lines(tmp_path / "answers.problems.jsonl")}
    assert sum("vocabulary of 57" in reason for reason in reasons.values()) == 1
    assert "'token_ids' is no list" in reasons["chats.json.gz:7"] and "no known form" in reasons["chats.json.gz:6"]
    assert {record["messages"][0]["content"] for record in lines(out)} == {"ABC\u2028", "BCDE", "CDEF"}


def test_a_run_without_an_answer_is_no_success(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "z"}\n{"prompt": "zz"}\n')
    line = ["data", "generate", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "o.jsonl"), "--model", folder]
    assert cli.main([*line, "--max-new-tokens", "8", "--temperatures", "0", "--executor", "eager"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no prompt could be answered (2: " in error and "vocabulary of 57" in error and "give others" in error
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_prepared_rows_hold_what_the_target_can_read(folder, file, tmp_path, capsys):
    line = ["data", "prepare", file, "-o", str(tmp_path / "out"), "--model", folder, "--held-out", "0"]
    assert cli.main([*line, "--length", "65"]) == 2
    assert "--length 65 is more than the target's context of 64" in capsys.readouterr().err
    assert cli.main(line) == 0
    told = capsys.readouterr()
    assert "4 documents" in told.out and "rows of 64 " in told.out, "as long as the context, unless asked for"
    assert "chats.json.gz: read as ShareGPT, 4 of 7 records" in told.err
    assert "left out 1, in line 1: it has a token id beyond the target's vocabulary of 57" in told.err
    splits, _ = open_data(tmp_path / "out")
    assert splits["train"].extremes("input_ids")[1] < KNOWN


@pytest.mark.parametrize("context", [23, 24])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_rows_beyond_ids_and_context_are_refused(tmp_path, kind, context):
    import transformers

    long = {"input_ids": [5] * 24, "loss_mask": [1] * 24, "position_ids": [*range(24)], "document": [0] * 24}
    splits, _ = open_data(write_data(tmp_path / "data", [*random_rows(3), long], random_rows(2)))
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=61, n_positions=context, n_embd=16, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = tiny_llama(max_position_embeddings=context)
    if context == 24:
        check_rows(splits, model, "data")
    else:
        with pytest.raises(ValueError, match=r"has texts of 24 tokens, and the target's context is 23; .*--length 23"):
            check_rows(splits, model, "data")
    odd = random_rows(2)
    odd[1]["input_ids"][3] = 61
    splits, _ = open_data(write_data(tmp_path / "odd", random_rows(3), odd))
    with pytest.raises(ValueError, match=r"held_out of data folder data has token ids .* to 61, .* ends at 60"):
        check_rows(splits, tiny_llama(max_position_embeddings=64), "data")


def test_train_and_evaluate_look_at_the_rows_first(folder, tmp_path, capsys):
    rows = random_rows(4)
    rows[2]["input_ids"][0] = 1_000_000_000
    data = str(write_data(tmp_path / "data", random_rows(4), rows))
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {
                "objective": {"kind": "draft_lm", "layers": [1]},
                "target": {"model": folder},
                "data": {"folder": data},
                "run": {"folder": str(tmp_path / "run")},
            }
        )
    )
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ABC"}')
    judged = ["evaluate", folder, "--prompts", str(prompts), "--data", data, "--model", folder, "--max-new-tokens", "8"]
    for line in (["train", str(config)], [*judged, "-o", str(tmp_path / "acceptance.json")]):
        assert cli.main(line) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "token ids" in error and "prepare it with the target's own tokenizer" in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "acceptance.json").exists()


def test_a_prompt_file_is_text_whatever_it_holds(folder, tmp_path, capsys, monkeypatch):
    line = ["generate", "--model", folder, "--max-new-tokens", "5", "--json", "--prompt-file"]
    texts = []
    for name, content in (("a", b"ABC"), ("b.gz", gzip.compress(b"\xef\xbb\xbfABC"))):
        (tmp_path / name).write_bytes(content)
        assert cli.main([*line, str(tmp_path / name)]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    (tmp_path / "c").write_bytes(b"a \xff b")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff b")))
    for name in (str(tmp_path / "c"), "-"):
        assert cli.main([*line, name]) == 2
        assert "is no text in UTF-8 (byte 0xff at 2)" in capsys.readouterr().err


def test_texts_that_decoding_cannot_read_are_refused():
    from paceline.spec.serve.texts import Text, decode_texts

    for token in (KNOWN, -1):
        with pytest.raises(ValueError, match="a text has a token id beyond the model's vocabulary of 57"):
            decode_texts(tiny_llama(vocab=KNOWN), [Text([5, token], 2, 0, 9)], lambda *ended: None, batch=1)
