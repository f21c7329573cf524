"""`paceline data generate`: every prompt accounted for, runs that go on, servers that fail, prompts kept out."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import paceline
import pytest
import torch
from paceline.spec.cli import main as cli
from paceline.training.data import server as server_module
from paceline.training.data.answers import _said
from paceline.training.data.ledger import own_seed
from paceline.training.data.prompts import Prompt, Unusable, read_prompts, sift, turns_of
from paceline.training.records import Journal
from transformers import PreTrainedTokenizerFast

from conftest import tiny_llama

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a{% endif %}"

ENDS = [2, *range(30, 37)]  # so many that some answers end early


@pytest.fixture(scope="module")
def chat(tokenizer):
    """The letters' tokenizer with a template that marks turns by a letter: "uABC</s>aXYZ</s>"."""
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    made.eos_token = "</s>"
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_llama(max_position_embeddings=128, seed=4)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(path)
    chat.save_pretrained(path)
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return str(path)


def generate(folder, *arguments):
    options = ["--model", folder, "--max-new-tokens", "9", "--batch", "3", "--executor", "eager"]
    return cli.main(["data", "generate", *options, *map(str, arguments)])


PROMPTS = [
    {"prompt": "ABC"},
    {"turns": ["DEF", "GH"]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "KLM"}], "source": "other"},
    {"messages": [{"role": "user", "content": "X"}, {"role": "assistant", "content": "no"}]},
]
BAD = [{"prompt": ""}, {"question": "?"}, "{broken", {"turns": []}, {"prompt": "ABC"}, {"prompt": "A" * 125}]


def test_every_prompt_is_accounted_for(folder, chat, tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", PROMPTS + BAD)
    out = tmp_path / "out.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0,0.8", "--repeats", "2", "--max-new-tokens", 4) == 0
    assert "12 done + 0 failed + 18 skipped = 30 asked for" in capsys.readouterr().out
    records, problems = lines(out), lines(tmp_path / "out.problems.jsonl")
    assert len({record["id"] for record in records}) == 12 and len({p["id"] for p in problems}) == 18
    reasons = {problem["reason"].split(" ")[0] for problem in problems}
    assert {"no", "none", "the", "a"} <= reasons and any("context is 128" in p["reason"] for p in problems)
    assert {record["source"] for record in records} == {"p", "other"}
    for record in records:
        assert [m["role"] for m in record["messages"] if m["role"] != "system"][:2] == ["user", "assistant"]
        assert record["tokens"] == sum(map(len, record["token_ids"])) and record["seed"] == own_seed(0, record["id"])
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


def test_the_limit_of_tokens_leaves_the_rest_for_later(folder, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", [{"prompt": "AB" + chr(67 + i)} for i in range(20)]), tmp_path / "o.jsonl"
    assert generate(folder, source, "-o", out, "--temperatures", "0", "--limit-tokens", "30") == 0
    text = capsys.readouterr().out
    assert "left by the limit" in text
    assert 30 <= sum(record["tokens"] for record in lines(out)) < 30 + 3 * 9 + 9
    assert generate(folder, source, "-o", out, "--temperatures", "0") == 0
    assert len(lines(out)) == 20


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
        said = paceline.generate(model, prompt, seed=own_seed(0, f"self/{number}"), **options)[0, prompt.shape[1] :]
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
    held_out = list(read_prompts(str(real)))
    sifted = list(sift([*held_out, Prompt(("Something of my own.",), None, "mine")], turns_of(str(real))))
    assert [entry for entry in sifted if isinstance(entry, Prompt)] == [Prompt(("Something of my own.",), None, "mine")]
    assert all("excluded" in entry.reason for entry in sifted if isinstance(entry, Unusable)) and len(held_out) == 24


def test_a_data_set_on_disk_is_a_source(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"prompt": "ABC"}, {"prompt": "DEF"}]).save_to_disk(tmp_path / "set")
    assert [prompt.turns for prompt in read_prompts(str(tmp_path / "set"))] == [("ABC",), ("DEF",)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a file or data set"),
        (["p.jsonl", "--source", "self"], "either a file or data set"),
        (["nowhere.jsonl", "-o", "o.jsonl"], "no file, and no data set"),
        (["p.jsonl"], "-o FILE"),
        (["p.jsonl", "-o", "o.jsonl", "--temperatures", "hot"], "no list of numbers"),
        (["p.jsonl", "-o", "o.jsonl", "--top-p", "0"], "not above 0"),
        (["empty.jsonl", "-o", "o.jsonl"], "holds no prompts"),
        (["p.jsonl", "-o", "p.jsonl"], "which says how it was made"),
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
    assert generate(folder, *arguments) == 2
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


class Chat(BaseHTTPRequestHandler):
    """Answers with the last user turn reversed, unless `plan` says something else for a request's number."""

    plan: dict = {}  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            number = len(self.asked)
            self.asked.append(body)
        what = self.plan.get(number, self.plan.get("all", 200))
        if what == "torn":
            self.send_response(200)
            self.send_header("Content-Length", "999")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        text = body["messages"][-1]["content"][::-1]
        reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        data = json.dumps(reply | {"usage": {"completion_tokens": len(text)}} if what == 200 else {}).encode()
        self.send_response(400 if what == 400 else what)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def chat_server(monkeypatch):
    monkeypatch.setattr(server_module.time, "sleep", lambda seconds: None)
    Chat.plan, Chat.asked = {}, []
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_address[1]}/v1"
    serving.shutdown()
    serving.server_close()


def by_server(url, *arguments):
    return cli.main(["data", "generate", "--model", "big", "--server", url, "--batch", "2", *map(str, arguments)])


def test_a_server_answers(chat_server, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "o.jsonl"
    Chat.plan = {0: 503, 2: "torn", 4: 429}
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0,0.5") == 0
    assert "8 done + 0 failed + 0 skipped = 8" in capsys.readouterr().out
    two = next(r for r in lines(out) if r["messages"][0]["content"] == "DEF" and r["temperature"] == 0.5)
    assert [message["content"] for message in two["messages"]] == ["DEF", "FED", "GH", "HG"]
    assert two["tokens"] == 5 and two["finished"] and "token_ids" not in two
    assert {body["temperature"] for body in Chat.asked} == {0.0, 0.5} and Chat.asked[0]["model"] == "big"


def test_a_server_that_fails_half_way_loses_nothing(chat_server, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", [{"prompt": f"P{i}"} for i in range(20)]), tmp_path / "o.jsonl"
    Chat.plan = {"all": 500} | dict.fromkeys(range(7), 200)
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0") == 0
    assert "7 done + 13 failed + 0 skipped = 20" in capsys.readouterr().out
    assert len(Chat.asked) < 7 + 20 * server_module.TRIES, "a server that is gone is not asked for every prompt"
    Chat.plan = {}
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0") == 0
    assert "20 done + 0 failed" in capsys.readouterr().out and len({r["id"] for r in lines(out)}) == 20


def test_a_request_that_the_server_refuses_is_not_repeated(chat_server, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", [{"prompt": "A"}, {"prompt": "B"}]), tmp_path / "o.jsonl"
    Chat.plan = {0: 400}
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0", "--batch", "1") == 0
    assert "1 done + 1 failed" in capsys.readouterr().out and len(Chat.asked) == 2
    (problem,) = lines(tmp_path / "o.problems.jsonl")
    assert "HTTP 400" in problem["reason"]


def test_the_comparison_with_transformers_prints_a_ratio(folder, tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", PROMPTS)
    assert generate(folder, source, "--temperatures", "0", "--compare-transformers") == 0
    last = capsys.readouterr().out.splitlines()
    assert last[-2].split()[0] == "together" and last[-2].endswith("x") and "4 prompts, batch 3" in last[-1]
