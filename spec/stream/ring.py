"""Which buffer holds which layer, and what is fetched next.

Layers are asked for in turn, and after the last comes the first again, that of the next forward. Those that somebody
waits for are fetched first, and then those that will be asked for next, as many as there are buffers in which no
forward computes. A forward that is broken off simply asks for another layer than the next one. Knows nothing of how
layers are fetched.
"""

from collections.abc import Hashable


class Ring:
    """`layers` in turn through `buffers`. Buffers and layers are numbers from 0."""

    def __init__(self, layers: int, buffers: int):
        self.layers = layers
        self.next = 0  # the layer that will be asked for
        self.waiting: dict[Hashable, int] = {}  # who waits for which layer, the longest first
        self.holds: list[int | None] = [None] * buffers  # the layer that a buffer has or is getting
        self.ready = [False] * buffers  # whether it has it
        self.users: list[set[Hashable]] = [set() for _ in range(buffers)]  # who computes with it

    def fetch(self) -> tuple[int, int] | None:
        """Begin to fetch: (layer, buffer), or None where there is nothing to fetch now. `fetched` ends it."""
        free = [buffer for buffer, users in enumerate(self.users) if not users]
        following = ((self.next + index) % self.layers for index in range(self.layers))
        in_use = {self.holds[buffer] for buffer, users in enumerate(self.users) if users}
        candidates = dict.fromkeys([*self.waiting.values(), *following])
        wanted = [layer for layer in candidates if layer not in in_use][: len(free)]
        missing = [layer for layer in wanted if layer not in self.holds]
        settled = [buffer for buffer in free if self.holds[buffer] is None or self.ready[buffer]]
        idle = [buffer for buffer in settled if self.holds[buffer] not in wanted]
        if not missing or not idle:
            return None
        self.holds[idle[0]], self.ready[idle[0]] = missing[0], False
        return missing[0], idle[0]

    def fetched(self, buffer: int, whole: bool) -> None:
        """What `buffer` was getting is there; or, where not `whole`, never came."""
        self.ready[buffer] = whole
        if not whole:
            self.holds[buffer] = None

    def ask(self, layer: int, user: Hashable) -> None:
        """`user` needs `layer` now, and waits until it takes it or leaves."""
        self.next = self.waiting[user] = layer

    def take(self, layer: int, user: Hashable) -> int | None:
        """The buffer that holds `layer`, in use by `user` from now on; None where it is not there yet."""
        buffer = next((index for index, held in enumerate(self.holds) if held == layer and self.ready[index]), None)
        if buffer is not None:
            self.users[buffer].add(user)
            self.waiting.pop(user, None)
            self.next = (layer + 1) % self.layers
        return buffer

    def leave(self, user: Hashable) -> tuple[int, int | None] | None:
        """`user` computes no longer with a layer, and waits for none. Returns the buffer that it computed with, and the
        layer there if nobody else computes with it; None where it computed with none."""
        self.waiting.pop(user, None)
        for buffer, users in enumerate(self.users):
            if user in users:
                users.remove(user)
                return buffer, None if users else self.holds[buffer]
        return None
