"""Answers of a server: one that fails half-way loses nothing, a refused request is not repeated."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from paceline.spec import cli
from paceline.training.data import server as server_module

from support.data_runs import PROMPTS, lines, write


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


def test_a_mistyped_model_does_not_bind_the_right_one(chat_server, tmp_path, capsys):
    source, out = write(tmp_path / "p.jsonl", [{"prompt": "A"}, {"prompt": "A", "turns": []}]), tmp_path / "o.jsonl"
    Chat.plan = {"all": 404}
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0", "--model", "bgi") == 0
    assert "0 done + 1 failed + 1 skipped" in capsys.readouterr().out
    assert {problem["status"] for problem in lines(tmp_path / "o.problems.jsonl")} == {"failed", "skipped"}
    Chat.plan = {}
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0") == 0
    assert "1 done + 0 failed + 1 skipped" in capsys.readouterr().out
    assert [problem["status"] for problem in lines(tmp_path / "o.problems.jsonl")] == ["skipped"]
    assert by_server(chat_server, source, "-o", out, "--temperatures", "0", "--model", "bgi") == 2
