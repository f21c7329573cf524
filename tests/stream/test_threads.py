"""Threads: several that share a streamed model, those that read for it, and what is left of them in the end."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from paceline.spec.stream import disk
from paceline.spec.stream.record import StreamError
from stream.streaming import resident, streamed, text

from support.sentences import one_sentence

PROMPT = torch.tensor([[5, 9, 33, 12, 7, 40, 5, 9, 33, 12]])


LEAVES = """
import time, torch
from paceline.spec.stream.disk import Prefetcher

class Files:
    files, buffers = [None] * 4, [None] * 2

    def fetch(self, layer, buffer):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            torch.ones(8)[:4]
        return 8

    def close(self):
        print("closed")

fetching = Prefetcher(Files())
"""


def in_threads(*acts):
    """What the acts return or raise, each in a thread of its own, which may not take more than 20 seconds."""
    made = {}

    def run(number, act):
        torch.set_num_threads(1)
        try:
            made[number] = act()
        except StreamError as error:
            made[number] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return [made[number] for number in range(len(acts))]


def name_of(descriptor):
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))


def ours():
    """The threads that read for streamed models."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("paceline-")}


def test_several_threads_share_a_streamed_model(path):
    model = streamed(path, 5)
    truths = [text(resident(path), PROMPT + shift)[0] for shift in range(3)]
    texts = in_threads(*([lambda shift=shift: text(model, PROMPT + shift)[0] for shift in range(3)] * 2))
    assert all(torch.equal(made, truths[number % 3]) for number, made in enumerate(texts))


def test_a_read_that_fails_ends_one_forward_and_no_other(path, monkeypatch):
    plain, failed = os.preadv, threading.Event()

    def preadv(descriptor, *rest):
        if name_of(descriptor) == "layer-002.bin" and not failed.is_set():
            time.sleep(0.3)  # until the others wait too
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, *rest)

    model = streamed(path, 5)
    truths = [text(resident(path), PROMPT + shift)[0] for shift in range(3)]
    monkeypatch.setattr(os, "preadv", preadv)
    texts = in_threads(*(lambda shift=shift: text(model, PROMPT + shift)[0] for shift in range(3)))
    errors = [made for made in texts if isinstance(made, StreamError)]
    assert len(errors) == 1 and "Input/output error" in str(errors[0])
    assert all(made is errors[0] or torch.equal(made, truth) for made, truth in zip(texts, truths))


@pytest.mark.parametrize("collector", ["paceline-read", "paceline-stream"])
def test_a_model_in_a_cycle_is_let_go_by_the_thread_that_collects_it(collector, path, cache, monkeypatch):
    """Also by those that read for it at this moment."""
    plain_read, plain_fetch, going, collected = os.preadv, disk.LayerFiles.fetch, threading.Event(), []

    def collect():
        if gone and not collected and threading.current_thread().name.startswith(collector):
            collected.append(gc.collect())

    def preadv(descriptor, *rest):
        going.wait(10)
        collect()
        return plain_read(descriptor, *rest)

    def fetch(*arguments):
        size = plain_fetch(*arguments)
        collect()
        return size

    gc.collect()
    before, gone = set(threading.enumerate()), []
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(disk.LayerFiles, "fetch", fetch)
    going.set()
    model = streamed(path, 5)
    model.itself = {"model": model}
    model.model.layers[5].register_forward_hook(lambda *ignored: going.clear())
    gc.disable()
    try:
        with torch.no_grad():
            model(PROMPT)
        del model
        gone.append(True)
        going.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
    finally:
        gc.enable()
    assert collected and set(threading.enumerate()) <= before
    open_files = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.exists(each.path)]
    assert not any(file.startswith(str(cache)) for file in open_files)


def test_a_read_that_fails_in_the_middle_of_a_prompt(path, monkeypatch):
    """Of the second chunk of four: the text is empty, the next call reads all of it, and no thread stays behind."""
    gc.collect()
    before, model = ours(), streamed(path, 5)
    truth, plain, forwards, failed = text(resident(path), PROMPT)[0], os.preadv, [], []
    model.model.layers[0].register_forward_pre_hook(lambda *ignored: forwards.append(1))

    def preadv(descriptor, *rest):
        if name_of(descriptor) == "layer-002.bin" and len(forwards) == 2:
            failed.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StreamError) as caught:
        text(model, PROMPT, prefill_chunk=3)
    one_sentence(caught.value, "layer-002.bin", "Input/output error", "check the disk")
    assert failed and torch.equal(caught.value.output.sequences, PROMPT) and not caught.value.output.trace.events
    assert torch.equal(text(model, PROMPT, prefill_chunk=3)[0], truth)
    del model, caught
    gc.collect()
    for thread in ours() - before:
        thread.join(5)
    assert ours() <= before


def test_a_layer_that_fails_while_another_is_waited_for(monkeypatch):
    """As after a forward that was broken off: what failed was fetched for that one, and holds up nobody else."""
    reading, asked, failed, ask = threading.Event(), threading.Event(), [], disk.Ring.ask

    class Files:
        files, buffers = [None] * 4, [None] * 2

        def fetch(self, layer, buffer):
            if layer == 2 and not failed:
                reading.set()
                asked.wait(10)
                failed.append(layer)
                raise StreamError("once")
            return 1

        def close(self):
            pass

    def asking(ring, layer, user):
        ask(ring, layer, user)
        if layer == 0:
            asked.set()

    monkeypatch.setattr(disk.Ring, "ask", asking)
    prefetcher, taken = disk.Prefetcher(Files()), []
    prefetcher.acquire(1, "forward")
    assert reading.wait(10)
    prefetcher.release("forward", lambda layer: None)
    waiting = threading.Thread(target=lambda: taken.append(prefetcher.acquire(0, "next")), daemon=True)
    waiting.start()
    waiting.join(10)
    assert failed and taken, "it waits for ever"
    prefetcher.release("next", lambda layer: None)
    assert prefetcher.acquire(2, "next") in (0, 1), "it is fetched again"
    prefetcher.close()
    prefetcher.join(5)


def test_a_forked_process_is_told(path):
    model = streamed(path, 5)
    text(model, PROMPT)
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            model(PROMPT)
        except StreamError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as said:
        assert "cannot be used in a forked process" in said.read()
    os.waitpid(child, 0)
    assert torch.equal(text(model, PROMPT)[0], text(resident(path), PROMPT)[0])


@pytest.mark.slow
def test_an_exit_while_layers_are_fetched_is_an_ordinary_one():
    """A thread that came back from torch after the interpreter's end would abort the process."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
