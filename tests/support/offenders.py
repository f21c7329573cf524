"""Drafters that do one thing too many in their step, and what a tape says of it."""

import torch
from paceline.drafters.ngram import NgramSession


class Offender(NgramSession):
    """Prompt lookup that does one thing too many in its step."""

    offence = staticmethod(lambda session, state, tokens: None)
    steps = 0

    def propose(self, state):
        proposal = super().propose(state)
        self.steps += 1
        tokens = self.offence(self, state, proposal.tokens)
        if tokens is not None:
            proposal.tokens.copy_(tokens)
        return proposal


def host_read(session, state, tokens):
    return tokens + (int(state.lengths[0]) < 0)


def silent_host_read(session, state, tokens):
    return tokens + (state.lengths.tolist()[0] < 0)


def branch(session, state, tokens):
    return tokens * 1 if bool(state.done.all()) else None


def host_constant(session, state, tokens):
    return torch.maximum(tokens, torch.tensor([-1]))


def boolean_index(session, state, tokens):
    tokens[tokens < -1] = 0


def dynamic_shape(session, state, tokens):
    return tokens + 0 * len((tokens > 5).nonzero())


def randomness(session, state, tokens):
    return tokens + (torch.rand(1) < 0).long()


def cross_device(session, state, tokens):
    tokens.to("meta")


def baked_count(session, state, tokens):
    """A Python number that should have advanced: drafts shift from the third step on."""
    return torch.where(tokens.new_full((), 1) > 0, tokens.roll(session.steps % 3, 1), tokens)


def rebound(session, state, tokens):
    """A buffer replaced where it should have been written."""
    session.kept = getattr(session, "kept", torch.zeros_like(tokens)) + 1
    return torch.where(session.kept > 3, tokens, -1)


OFFENDERS = {
    host_read: "host read",
    silent_host_read: "host read",
    branch: "host read",
    host_constant: "host constant",
    boolean_index: "boolean index",
    dynamic_shape: "dynamic shape",
    randomness: "unregistered randomness",
    cross_device: "cross-device",
    baked_count: None,
    rebound: None,
}
