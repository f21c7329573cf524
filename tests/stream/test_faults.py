"""Faults of disks, files and people end in one sentence, and nothing that was generated or written is lost."""

import errno
import os
import signal
import threading
import time

import paceline
import pytest
import torch
from paceline.spec.stream import layout, reader
from paceline.spec.stream.record import StreamError
from paceline.spec.stream.streamer import streamer_of
from stream.streaming import assert_same, folder_for, resident, streamed, text

from support.sentences import one_sentence, sentence

PROMPT = torch.tensor([[5, 9, 33, 12, 7, 40, 5, 9, 33, 12]])
GREEDY = dict(do_sample=False, max_new_tokens=20)


class At:
    """Does something to the disk after so many steps."""

    def __init__(self, step, act):
        self.left, self.act = step, act

    def __call__(self, events):
        self.left -= 1
        if not self.left:
            self.act()


def damaged(path, act, *words):
    """A text in the middle of which `act` is done to a layer's file: the sentence, and the text until then."""
    model = streamed(path, 5)
    truth, _ = text(model, PROMPT, max_new_tokens=20)
    file = folder_for(path).file("layer-002")
    with pytest.raises(StreamError) as caught:
        paceline.generate(model, PROMPT, on_step=At(4, lambda: act(file)), **GREEDY)
    one_sentence(caught.value, str(file), *words)
    kept = caught.value.output
    count = kept.sequences.shape[1]
    assert PROMPT.shape[1] + 4 <= count < truth.shape[1] and torch.equal(kept.sequences, truth[:, :count])
    assert sum(len(event.committed) for event in kept.trace.events) == count - PROMPT.shape[1]
    return model


def test_a_file_is_cut_short_under_way(path):
    damaged(path, lambda file: os.truncate(file, file.stat().st_size - 4096), "bytes of", "made anew")
    assert_same(resident(path), streamed(path), PROMPT)  # it was made anew, as its size tells


def test_a_file_is_changed_under_way(path):
    def change(file):
        with open(file, "rb+") as opened:
            opened.seek(100)
            opened.write(b"other")

    damaged(path, change, "was changed while it was in use")
    model = streamed(path)  # of the right size, but other numbers
    sentence(lambda: paceline.generate(model, PROMPT, **GREEDY), "does not hold what was written", "delete")


def test_the_disk_fails_in_the_middle_of_a_forward_and_comes_back(path, monkeypatch):
    plain, failing = os.preadv, []

    def preadv(descriptor, buffers, start):
        if failing and os.readlink(f"/proc/self/fd/{descriptor}").endswith("layer-002.bin"):
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", preadv)
    model = damaged(path, lambda file: failing.append(file), "Input/output error", "check the disk")
    failing.clear()
    assert_same(resident(path), model, PROMPT)


def test_embeddings_fail_too(path):
    """Bytes that are changed, and others of the same number and time; then none."""
    model = streamed(path)
    paceline.generate(model, PROMPT, **GREEDY)
    file = folder_for(path).file("embeddings")
    about = file.stat()
    file.write_bytes(bytes(about.st_size))
    sentence(lambda: paceline.generate(model, PROMPT, **GREEDY), "embeddings.bin was changed while it was in use")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    sentence(lambda: streamed(path), "embeddings.bin does not hold what was written", "load the model again")
    os.truncate(file, 0)
    sentence(lambda: paceline.generate(model, PROMPT, **GREEDY), "embeddings.bin has 0 bytes of 8192")


def test_embeddings_fail_in_the_middle(path, monkeypatch):
    plain, failing = os.preadv, []

    def preadv(descriptor, *rest):
        if failing and os.readlink(f"/proc/self/fd/{descriptor}").endswith("embeddings.bin"):
            raise OSError(errno.EIO, "Input/output error")
        return plain(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    model = streamed(path, 3)
    with pytest.raises(StreamError, match="Input/output error") as caught:
        paceline.generate(model, PROMPT, on_step=At(4, lambda: failing.append(1)), **GREEDY)
    assert caught.value.output.sequences.shape[1] >= PROMPT.shape[1] + 4


@pytest.mark.parametrize("token", [61, 62, -1])
def test_tokens_that_there_are_not(token, path):
    ids = torch.tensor([[5, token]])
    for model in (resident(path), streamed(path, 3)):
        with pytest.raises(IndexError, match="index out of range"):
            model(ids)


def test_anything_else_that_goes_wrong_in_the_thread_is_told_too(path, monkeypatch):
    model = streamed(path)
    paceline.generate(model, PROMPT, **GREEDY)
    monkeypatch.setattr(reader.Reader, "read", lambda *ignored: [][1])
    sentence(lambda: paceline.generate(model, PROMPT, **GREEDY), "could not be fetched", "list index out of range")


@pytest.mark.parametrize("moment", ["open", "read"])
def test_a_file_system_without_direct_reads(path, cache, monkeypatch, capsys, moment):
    plain_open, plain_read, asked = os.open, os.preadv, []

    def refuse():
        raise OSError(errno.EINVAL, "Invalid argument")

    def opened(file, flags, *rest):
        if moment == "open" and flags & os.O_DIRECT:
            refuse()
        return plain_open(file, flags, *rest)

    def read(descriptor, *rest):
        with open(f"/proc/self/fdinfo/{descriptor}") as about:
            flags = int(about.read().split("flags:")[1].split()[0], 8)
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(cache)):  # no model of an earlier test
            asked.append(flags & os.O_DIRECT)
        if moment == "read" and flags & os.O_DIRECT:
            refuse()
        return plain_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    model = streamed(path)
    assert_same(resident(path), model, PROMPT)
    assert capsys.readouterr().err.count("without direct reads") == 1
    assert not streamer_of(model).about.direct and bool(asked[0]) == (moment == "read") and not any(asked[-9:])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_a_file_system_in_memory(path, monkeypatch):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setenv("PACELINE_CACHE", folder)
        assert_same(resident(path), streamed(path), PROMPT)


def test_a_full_disk_while_repacking_and_going_on(path, monkeypatch, capsys):
    plain, written = layout.FileWriter.finish, []

    def finish(writer):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(1)
        return plain(writer)

    monkeypatch.setattr(layout.FileWriter, "finish", finish)
    sentence(lambda: streamed(path), "the disk is full", "layer-003", "goes on from there")
    folder = folder_for(path)
    assert len(list(folder.path.glob("layer-*.bin"))) == 3 and folder.model() is None
    times = {file: file.stat().st_mtime_ns for file in folder.path.glob("layer-*.bin")}
    monkeypatch.setattr(layout.FileWriter, "finish", plain)
    assert_same(resident(path), streamed(path), PROMPT)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items()), "what was written stays"


def test_no_room_is_told_before_anything_is_written(path, monkeypatch, capsys):
    import shutil

    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    sentence(lambda: streamed(path), "has room for 0.0 GB", "PACELINE_CACHE")
    assert "repacking" in capsys.readouterr().err and not list(folder_for(path).path.glob("*.bin"))


def test_a_cache_that_cannot_be_written(path, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "file"))
    sentence(lambda: streamed(path), "cannot be written", "PACELINE_CACHE")


def test_ctrl_c_in_the_middle_of_a_forward(path):
    """In the middle of a layer, and while one waits for a layer; then the model is as good as before."""
    model = streamed(path, 5)
    truth, _ = text(model, PROMPT)
    layer, calls = model.model.layers[3].mlp, []

    def interrupt(*ignored):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    hook = layer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        paceline.generate(model, PROMPT, **GREEDY)
    hook.remove()
    assert torch.equal(text(model, PROMPT)[0], truth)

    plain, slow = reader.Reader.read, threading.Event()

    def read(*arguments):
        slow.wait(5)
        return plain(*arguments)

    reader.Reader.read = read
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        begun = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            while True:
                paceline.generate(model, PROMPT, **GREEDY)
        assert time.perf_counter() - begun < 4
    finally:
        signal.signal(signal.SIGINT, before)
        reader.Reader.read = plain
        slow.set()
    assert torch.equal(text(model, PROMPT)[0], truth)
