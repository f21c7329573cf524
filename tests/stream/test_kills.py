"""A kill while a model is repacked leaves what was written, and two processes that want one model share the work."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from paceline.spec.stream import layout
from stream.streaming import LAYERS, USUAL, assert_same, folder_for, resident, streamed

PROMPT = torch.tensor([[5, 9, 33, 12, 7, 40, 5, 9, 33, 12]])

REPACK = """
import os, sys
import paceline, torch
from paceline.spec.kernels import native
from paceline.spec.stream import layout, reader
from transformers import LlamaForCausalLM
layout.PIECE = reader.PIECE = 4 * reader.PAGE
native.prepare()
os.environ["PACELINE_CACHE"] = sys.argv[2]
plain, written = layout.FileWriter.finish, []
def finish(writer):
    made = plain(writer)
    written.append(1)
    print("file", flush=True)
    if len(written) == stop:
        os.read(0, 1)
    return made
layout.FileWriter.finish = finish
def repack():
    print(os.getpid(), flush=True)
    model, _ = paceline.load_target(sys.argv[1], "float32", "cpu", with_tokenizer=False, stream="disk", resident="1GB")
    print(model(torch.arange(3, 9)[None]).logits.double().sum().item(), flush=True)
    os._exit(0)
for stop in (3, 1):
    if not os.fork():
        repack()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    os.read(0, 1)
"""


@pytest.mark.slow
def test_a_kill_while_repacking_goes_on_and_two_processes_share_it(path, cache, monkeypatch):
    """One process imports everything and forks two that repack: the first is killed at its third file; the second
    stops after its first one until this process, which wants the same model, waits for it."""
    usual = {**os.environ, "PACELINE_CACHE": USUAL}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", REPACK, str(path), str(cache)], env=usual, **pipes) as forks:

        def says(*lines):
            assert [forks.stdout.readline() for _ in lines] == [f"{line}\n" for line in lines]

        def go_on():
            forks.stdin.write("\n")
            forks.stdin.flush()

        killed = int(forks.stdout.readline())
        says("file", "file", "file")
        os.kill(killed, signal.SIGKILL)
        says(-signal.SIGKILL)
        folder = folder_for(path)
        kept = {file: file.stat().st_mtime_ns for file in folder.path.glob("layer-*.json")}
        assert folder.model() is None and len(kept) == 2
        go_on()
        assert int(forks.stdout.readline()) != killed
        says("file")
        waited, waiting = [], layout.waiting
        monkeypatch.setattr(layout, "waiting", lambda what: waited.append(what) or go_on() or waiting(what))
        here = streamed(path)
        assert len(waited) == 1 and "another process is repacking" in waited[0]
        out, err = forks.communicate("\n", timeout=60)
    *files, total, code = out.split()
    assert (forks.returncode, code) == (0, "0"), err
    assert files == ["file"] * (LAYERS + 2 - 2 - 1), "it goes on where the other was, and writes all"
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert here(torch.arange(3, 9)[None]).logits.double().sum().item() == float(total)
    assert_same(resident(path), here, PROMPT)
