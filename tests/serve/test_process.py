"""`paceline serve` as a process: how it begins, and how it ends."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from paceline.spec.cli import commands
from paceline.spec.cli.catalogue import make_parser
from paceline.spec.engines import pool
from paceline.spec.serve import command
from paceline.spec.serve.figures import Figures
from paceline.spec.serve.gears import Gear
from paceline.spec.serve.planner import RowPlanner
from paceline.spec.serve.row_sampler import KEPT_KINDS
from paceline.spec.tree import TreeShape
from serve.playing import toy
from serve.served import chatting

from support.tape import tape_executor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    toy().save_pretrained(path)
    chatting().save_pretrained(path)
    return path


class Served:
    def __init__(self, folder, port=0):
        options = ["--model", folder, "--drafter", "ngram", "--port", port, "--name", "toy", "--dtype", "float32"]
        options += ["--tree", "2x1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paceline.spec.cli", "serve", *map(str, options)], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        line = next(line for line in self.process.stderr if line.startswith("serving "))
        self.port = int(line.partition("/v1")[0].rpartition(":")[2])

    def ask(self, new_tokens):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"prompt": "@IU", "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body))
            return json.loads(connection.getresponse().read())

    def status(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status


@pytest.mark.slow
def test_a_signal_lets_texts_end_and_a_killed_server_can_be_started_again(folder):
    first, told = Served(folder), []
    whole = first.ask(200)["choices"][0]["text"]

    def ask_in_vain():
        with contextlib.suppress(OSError, http.client.HTTPException):
            first.ask(240)

    asking = threading.Thread(target=ask_in_vain)
    asking.start()
    first.process.kill()
    first.process.wait(60)
    asking.join(60)
    second = Served(folder, first.port)
    assert second.status() == 200
    asking = threading.Thread(target=lambda: told.append(second.ask(200)))
    asking.start()
    time.sleep(0.15)
    second.process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert told[0]["choices"][0]["text"] == whole and second.process.wait(60) == 0


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_trees_are_planned_unless_one_is_given(folder, drafter, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    args = make_parser().parse_args(["serve", "--model", str(folder), "--drafter", drafter, "--max-rows", "2"])
    worker, *_ = command.assemble(args, *commands.load(args), Figures("toy"))
    plan = worker.scheduler.plan
    args.tree = "2x1"
    if drafter == "none":
        assert plan(2) == TreeShape.chain(0), "there is nothing to time"
        with pytest.raises(ValueError, match="--drafter none makes none"):
            commands.load(args)
        return
    assert isinstance(plan, RowPlanner) and {rows for rows, _ in plan.times} == {1, 2}
    worker, *_ = command.assemble(args, *commands.load(args), Figures("toy"))
    assert worker.scheduler.plan(2) == TreeShape.parse("2x1")


@torch.no_grad()
def test_captured_steps_are_made_before_it_serves(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    args = make_parser().parse_args(["serve", "--model", str(folder), "--drafter", "ngram", "--max-rows", "2"])
    args.executor = "tape"
    with tape_executor(monkeypatch) as tapes:
        args.tree = "2x1"
        command.assemble(args, *commands.load(args), Figures("toy"))
        assert len(tapes) == 2 * len(KEPT_KINDS)
        args.tree = None
        tapes.clear()
        scheduler = command.assemble(args, *commands.load(args), Figures("toy"))[0].scheduler
        made, pairs = len(tapes), [*scheduler.plan.times]
        assert made == len(pairs) * len(KEPT_KINDS) and {rows for rows, _ in pairs} == {1, 2}
        for (rows, shape), kind in itertools.product(pairs, KEPT_KINDS):
            scheduler.gears.shift(Gear(rows, shape, kind))
        scheduler.gears.close()
    assert len(tapes) == made


def test_other_machines_are_served_with_a_key_only(monkeypatch):
    monkeypatch.delenv(command.KEY, raising=False)
    with pytest.raises(ValueError, match="set --api-key, or --insecure"):
        command.serve(Namespace(host="0.0.0.0", api_key=None, insecure=False))
    with pytest.raises(ValueError, match="--api-key is empty"):
        command.serve(Namespace(host="0.0.0.0", api_key=[""], insecure=False))


def test_ctrl_c_ends_a_server_that_is_loading(monkeypatch, capsys):
    """At once, and without the end of the interpreter, which a thread that is in torch does not survive."""
    go = threading.Event()

    def load(args):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert go.wait(20)
        raise ValueError("nobody hears of it")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(commands, "load", load)
    monkeypatch.setattr(command.os, "_exit", leave)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        with pytest.raises(SystemExit, match="130"):
            command.serve(Namespace(host="127.0.0.1", api_key=None, insecure=False, name="toy", model="toy"))
    except KeyboardInterrupt:
        pytest.fail("the interpreter would end")
    finally:
        signal.signal(signal.SIGINT, before)
        go.set()
    assert capsys.readouterr().err == "\nstopped\n"


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"needs uvicorn; pip install 'paceline\[serve\]'"):
        command.serve(Namespace(host="127.0.0.1", api_key=None, insecure=False))


def test_where_not_all_steps_can_be_kept_auto_is_eager(folder, tmp_path, monkeypatch, capsys):
    """What was named is refused."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "not a folder"))
    (tmp_path / "not a folder").write_text("")  # nothing can be kept there, which must not matter
    monkeypatch.setattr(pool, "KEPT_SHARE", 0.0)
    monkeypatch.setattr(command, "choose", lambda name, *arguments, **more: "tape")
    args = make_parser().parse_args(["serve", "--model", str(folder), "--drafter", "ngram", "--max-rows", "1"])
    loaded = commands.load(args)
    with tape_executor(monkeypatch):
        assert command.assemble(args, *loaded, Figures("toy"))[2]["executor"] == "eager"
        assert "the tape steps of up to 1 rows" in capsys.readouterr().err
        args.executor = "tape"
        with pytest.raises(ValueError, match="take more memory than the"):
            command.assemble(args, *loaded, Figures("toy"))
