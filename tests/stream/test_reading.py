"""Files read in pieces, several at a time, whatever the file system and the system do."""

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from paceline.spec.stream import reader
from stream.streaming import LAYERS, budget, folder_for

from support.sentences import sentence


@pytest.fixture
def layer(path):
    """A file of several pieces, and what it holds."""
    budget(path, LAYERS)  # which repacks it
    folder = folder_for(path)
    file, record = folder.file("layer-002"), folder.record("layer-002")
    assert len(record.sums) > 2
    return file, record


def test_a_file_is_read_as_it_was_written(layer):
    file, record = layer
    memory = reader.pages(record.size)
    reader.Reader().read(file, record.sums, memory)
    assert memory.numpy().tobytes() == file.read_bytes()


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_every_piece_is_compared(piece, layer):
    file, record = layer
    sums = [total + (number == piece) for number, total in enumerate(record.sums)]
    for read in (lambda: reader.Reader().verify(file, record.size, sums),
                 lambda: reader.Reader().read(file, sums, reader.pages(record.size))):  # fmt: skip
        sentence(read, str(file), "does not hold what was written", "load the model again")
    reader.Reader().verify(file, record.size, record.sums)


def test_reads_that_come_short_go_on_at_a_page(layer, monkeypatch):
    file, record = layer
    memory, plain, asked, most = reader.pages(record.size), os.preadv, [], [5000]

    def preadv(descriptor, buffers, start):
        asked.append((start, bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return min(plain(descriptor, buffers, start), *most)

    monkeypatch.setattr(os, "preadv", preadv)
    reader.Reader().read(file, record.sums, memory)
    assert memory.numpy().tobytes() == file.read_bytes() and all(start % 4096 == 0 for start, direct in asked if direct)
    most[0] = 0  # which could go on for ever
    sentence(lambda: reader.Reader().read(file, record.sums, memory), str(file), "made anew")


def test_a_read_that_cannot_begin_leaves_no_other_behind(layer, monkeypatch):
    """Its buffer is free then, and the next layer comes into it."""
    file, record = layer
    plain_read, plain_submit, ended, jobs = os.preadv, ThreadPoolExecutor.submit, [], []

    def preadv(*arguments):
        time.sleep(0.2)
        count = plain_read(*arguments)
        ended.append(1)
        return count

    def submit(*arguments):
        if len(jobs) == 2:
            raise RuntimeError("can't start new thread")
        jobs.append(plain_submit(*arguments))
        return jobs[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(RuntimeError, match="new thread"):
        reader.Reader().read(file, record.sums, reader.pages(record.size))
    assert len(ended) == 2


def test_files_that_are_no_longer_whole_are_closed(layer):
    file, record = layer
    reads, before = reader.Reader(), len(os.listdir("/proc/self/fd"))
    os.truncate(file, 4096)
    for _ in range(3):
        sentence(lambda: reads.read(file, record.sums, reader.pages(record.size)), f"has 4096 bytes of {record.size}")
    assert len(os.listdir("/proc/self/fd")) == before
