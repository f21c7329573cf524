"""Which layer is in which buffer: by a ring of numbers, and by queues of a device that is only pretended."""

import itertools
import threading
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paceline.spec.stream.budget import bytes_of, place, spread
from paceline.spec.stream.host import CudaCopies, HostFeeder
from paceline.spec.stream.reader import pages
from paceline.spec.stream.ring import Ring

from support.sentences import sentence

SIZES = dict(layers=st.integers(1, 7), buffers=st.integers(1, 4))


@given(**SIZES, asked=st.lists(st.integers(0, 6), max_size=30))
def test_a_ring_fetches_what_comes_next_and_never_what_is_in_use(layers, buffers, asked):
    """Any order of layers: forwards that are broken off, or of several threads."""
    ring = Ring(layers, buffers)
    for number, layer in enumerate(layer % layers for layer in asked):
        ring.ask(layer, number)
        fetched = []
        while (job := ring.fetch()) is not None:
            assert not ring.users[job[1]], "what is in use stays"
            fetched.append(job[0])
            ring.fetched(job[1], True)
        expected = {(layer + index) % layers for index in range(min(buffers, layers))}
        assert {held for held in ring.holds if held is not None} >= expected and set(fetched) <= expected
        buffer = ring.take(layer, number)
        assert ring.holds[buffer] == layer and ring.users[buffer] == {number}
        ahead = ring.fetch()
        assert ahead is None or (ahead[1] != buffer and ahead[0] != layer)
        if ahead is not None:
            ring.fetched(ahead[1], False)
        assert ring.leave(number) == (buffer, layer) and ring.leave(number) is None and not ring.users[buffer]


def test_a_layer_is_unused_when_its_last_user_leaves():
    ring = Ring(3, 2)
    ring.fetched(ring.fetch()[1], True)
    for user in "ab":
        ring.ask(0, user)
        assert ring.take(0, user) == 0
    assert [ring.leave(user) for user in "aba"] == [(0, None), (0, 0), None]


@given(layers=st.integers(3, 9), buffers=st.integers(2, 4), forwards=st.integers(1, 4))
def test_each_forward_fetches_each_layer_once(layers, buffers, forwards):
    ring, fetched = Ring(layers, buffers), []
    for layer in list(range(layers)) * forwards:
        ring.ask(layer, "me")
        for _ in range(2):
            while (job := ring.fetch()) is not None:
                fetched.append(job[0])
                ring.fetched(job[1], True)
            if not any(ring.users):
                assert ring.take(layer, "me") is not None
        ring.leave("me")
    assert len(fetched) <= layers * forwards + buffers
    expected = itertools.islice(itertools.cycle(range(layers)), len(fetched))
    assert layers <= buffers or fetched == list(expected)


@given(layers=st.integers(2, 7), buffers=st.integers(1, 3), starts=st.lists(st.integers(0, 6), min_size=2, max_size=5))
def test_nobody_waits_for_ever(layers, buffers, starts):
    """Forwards of several threads, each at a layer of its own, take turns until all have had all layers."""
    ring, left = Ring(layers, buffers), {}
    for user, start in enumerate(starts):
        left[user] = list(range(start % layers, layers)) + list(range(layers))
        ring.ask(left[user][0], user)
    for _ in range(4 * layers * len(starts)):
        if (job := ring.fetch()) is not None:
            ring.fetched(job[1], True)
        for user, rest in left.items():
            if rest and ring.take(rest[0], user) is not None:
                rest.pop(0)
                break
        else:
            for user, rest in left.items():
                if ring.leave(user) is not None:
                    if rest:
                        ring.ask(rest[0], user)
                    break
    assert not any(left.values())


class Queues:
    """A device of which copies and computing are queues that run in whatever order events allow, as late as can be."""

    waited = fetching = 0.0

    def __init__(self, layers, buffers, chance):
        self.content, self.chance = [None] * buffers, chance  # [buffer]: the layer that is there
        self.copying, self.computing = [], []  # (kind, what, work items that come first)
        self.done, self.last, self.left = set(), [None] * buffers, [[] for _ in range(buffers)]
        self.numbers, self.seen = itertools.count(), []

    def _put(self, queue, work, first):
        number = next(self.numbers)
        queue.append((number, work, [each for each in first if each is not None]))
        return number

    def copy(self, layer, buffer):
        def work():
            self.content[buffer] = layer

        self.last[buffer] = self._put(self.copying, work, self.left[buffer])
        self.left[buffer] = []
        return 1

    def wait(self, buffer):
        self._put(self.computing, lambda: None, [self.last[buffer]])

    def compute(self, layer, buffer):
        """Two products, so that a copy may come between."""
        for _ in range(2):
            self._put(self.computing, lambda: self.seen.append((layer, self.content[buffer])), [])

    def leave(self, buffer):
        self.left[buffer].append(self._put(self.computing, lambda: None, []))

    def run(self):
        """All that is queued: each queue in its order, and they in any."""
        while self.copying or self.computing:
            able = [queue for queue in (self.copying, self.computing) if queue and self.done.issuperset(queue[0][2])]
            number, work, _ = able[self.chance(len(able))].pop(0)
            work()
            self.done.add(number)


@given(**SIZES, forwards=st.integers(1, 3), broken=st.integers(0, 6), data=st.data())
def test_copies_and_computing_wait_for_each_other(layers, buffers, forwards, broken, data):
    """However late the device runs what is queued, each layer computes with its own numbers; also after a forward that
    was broken off in the middle of a layer."""
    queues = Queues(layers, buffers, lambda count: data.draw(st.integers(0, count - 1)))
    feeder, unused = HostFeeder(layers, buffers, queues), []
    order = [*range(min(broken, layers)), *list(range(layers)) * forwards]
    for layer in order:
        feeder.release("me", unused.append)
        queues.compute(layer, feeder.acquire(layer, "me"))
    feeder.release("me", unused.append)
    queues.run()
    assert unused == order
    assert queues.seen == [(layer, layer) for layer in order for _ in range(2)]


def test_a_thread_waits_for_a_buffer_that_others_use():
    feeder, got = HostFeeder(3, 1, Queues(3, 1, lambda count: 0)), []
    feeder.acquire(0, "first")
    other = threading.Thread(target=lambda: got.append(feeder.acquire(1, "second")))
    other.start()
    other.join(0.1)
    assert other.is_alive() and not got
    feeder.release("first", lambda layer: None)
    other.join(5)
    assert got == [0] and feeder.ring.users == [{"second"}] and feeder.ring.holds == [1]


def test_what_was_pinned_is_let_go_where_the_rest_cannot_be(monkeypatch):
    runtime = Mock(cudaHostRegister=Mock(side_effect=[0, 2]))
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    layers = [pages(4096) for _ in range(3)]
    sentence(lambda: CudaCopies(layers, [pages(4096)]), "be pinned (CUDA error 2)", "ulimit -l")
    runtime.cudaHostUnregister.assert_called_once_with(layers[0].data_ptr())


def test_budgets():
    assert place([10] * 4, 5, 45).resident == (0, 1, 2, 3) and place([10] * 4, 5, 45).buffers == 0
    placed = place([10] * 4, 5, 44)
    assert (placed.streamed, placed.resident, placed.bytes) == ((0, 2, 3), (1,), 35)
    assert place([10] * 4, 5, 25).streamed == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"at least 0\.1MB"):
        place([10] * 4, 5, 24)
    for streamed, count in ((1, 5), (2, 5), (3, 28), (28, 28)):
        chosen = spread(streamed, count)
        assert len(set(chosen)) == streamed and chosen[0] == 0 and (streamed == 1 or chosen[-1] == count - 1)


def test_sizes():
    sizes = {"8GB": 8e9, "512 MiB": 2**29, 10**6: 10**6, "1.5gb": 1.5e9, "7": 7}
    assert {size: bytes_of(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    "size", ["", "GB", "8 G", "-1GB", "0MB", "0.5", 0.5, True, float("nan"), float("inf"), None, -3]
)
def test_no_sizes(size):
    with pytest.raises(ValueError, match="write it like '8GB'"):
        bytes_of(size)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.filterwarnings("default::UserWarning:torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_gpu_streams_from_the_hosts_memory(family, dtype, tmp_path):
    import paceline
    from paceline.spec.stream.streamer import streamer_of
    from stream.streaming import LAYERS, saved, text

    path = saved(family, tmp_path / "model", dtype)
    ids = torch.arange(3, 30, device="cuda")[None]
    here, _ = paceline.load_target(path, dtype, "cuda", with_tokenizer=False)
    with pytest.raises(ValueError) as told:
        paceline.load_target(path, dtype, "cuda", stream="host", resident=1)
    least = str(told.value).rpartition(" ")[2]
    away, _ = paceline.load_target(path, dtype, "cuda", with_tokenizer=False, stream="host", resident=least)
    about = streamer_of(away).about
    assert about.kind == "host" and about.resident_layers < LAYERS and about.bytes_per_forward > 0
    for way in (dict(), dict(drafter="ngram", do_sample=True, seed=4)):
        for mine, truth in zip(text(away, ids, **way), text(here, ids, **way)):
            assert torch.equal(mine, truth)
    assert streamer_of(away).record.bytes_read > 0 and streamer_of(away).record.read_seconds > 0
