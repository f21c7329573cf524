"""A recurrent target, written against the protocol alone: rejected nodes leave no trace in its state."""

from dataclasses import replace

import pytest
import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines.executors import Eager
from paceline.spec.proposal import DrafterTraits, NoDrafter, Proposal
from paceline.spec.target.protocol import Seen, TargetTraits
from paceline.spec.tree import TokenTree, TreeShape

from support.engines import PROMPT, engine_of, request, texts_of
from support.tape import TapeExecutor


class Recurrent:
    """s' = tanh(A s + e(token)) for every token, logits W s'. A forward keeps what the nodes put in, and no state."""

    def __init__(self, batch, capacity=64, vocab=61, size=16):
        generator = torch.Generator().manual_seed(4)
        self.step, self.embeddings, self.head = (
            torch.randn(rows, size, generator=generator) for rows in (size, vocab, vocab)
        )
        self.model = None
        self.traits = TargetTraits(batch, capacity, torch.device("cpu"), vocab)
        self.packable = ()
        self.states = torch.zeros(batch, size)  # after the committed text without the root
        self.inputs = torch.zeros(batch, 64, size)  # of the nodes of the last forward

    @property
    def nbytes(self):
        return self.states.nbytes

    def next(self, states, inputs):
        return torch.tanh(0.4 * states @ self.step.T + inputs)

    def clear(self, rows=None):
        self.states[slice(None) if rows is None else rows] = 0

    def read(self, span):
        states = self.states[span.index]
        for tokens, positions in zip(span.tokens.T, span.positions.T):
            moved = self.next(states, self.embeddings[tokens])
            states = torch.where((positions >= 0)[:, None], moved, states)
        self.states[span.index] = states

    def forward(self, proposal, base):
        inputs = self.embeddings[proposal.tokens.clamp(min=0)]  # (B, N, H)
        self.inputs[:, : inputs.shape[1]] = inputs
        parents = proposal.tree.parents.expand(len(inputs), -1)
        states = [self.next(self.states, inputs[:, 0])]
        for node in range(1, inputs.shape[1]):
            above = torch.stack(states, 1).gather(1, parents[:, node, None, None].expand(-1, 1, inputs.shape[2]))[:, 0]
            states.append(self.next(above, inputs[:, node]))
        return Seen(torch.stack(states, 1) @ self.head.T, None)

    def commit(self, base, path, count):
        for column in range(path.shape[1]):
            node = path[:, column, None, None].expand(-1, 1, self.inputs.shape[2])
            moved = self.next(self.states, self.inputs.gather(1, node)[:, 0])
            self.states.copy_(torch.where((column < count)[:, None], moved, self.states))

    def copy_rows(self, other, rows, into=None):
        self.states[slice(None) if into is None else into] = other.states[rows]


class Guessing:
    """Drafts random tokens out of a few, so that now and then one is right."""

    name = "guessing"
    default_shape = TreeShape.parse("4x3x2")
    traits = DrafterTraits(follows_any_tree=True)

    def __init__(self, tokens):
        self.tokens, self.generator = torch.tensor(tokens), torch.Generator().manual_seed(0)

    def open(self, request):
        self.tree = TokenTree.of(request.shape, request.device)
        return self

    packable, nbytes = (), 0

    def clear(self, rows=None):
        pass

    def read(self, span, features):
        assert features is None

    def propose(self, state):
        drawn = torch.randint(len(self.tokens), (len(state.done), self.tree.size - 1), generator=self.generator)
        return Proposal(torch.cat([state.roots(), self.tokens[drawn]], 1), self.tree, "deterministic", "own")

    def follow(self, base, path, count, features):
        assert features is None


class Checked(Recurrent):
    """Every forward runs twice, and leaves no trace; every state is that of the committed text, read anew."""

    def forward(self, proposal, base):
        before = self.states.clone()
        self.forwards = getattr(self, "forwards", 0) + 1
        super().forward(replace(proposal, tokens=proposal.tokens.flip(1)), base)
        seen = super().forward(proposal, base)
        assert torch.equal(before, self.states)
        return seen


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rejected_nodes_leave_no_trace_in_a_recurrent_state(temperature):
    requests = [request(PROMPT, 30, 1), request(PROMPT[:1], 12, 2), request(PROMPT[:5], 20, 3)]
    plain, steps = texts_of(Eager(engine_of(Recurrent(3), NoDrafter(), TreeShape.chain(0), temperature)), requests)
    assert steps == 30
    drafter, target = Guessing(sorted({token for text in plain for token in text})[:20]), Checked(3)
    executor = Eager(engine_of(target, drafter, drafter.default_shape, temperature))
    texts, steps = texts_of(executor, requests)
    assert texts == plain and steps < 30, "some drafts are right"
    state = executor.engine.state
    for row in range(3):
        alone = torch.zeros(target.states.shape[1])
        for token in state.tokens[row, : int(state.lengths[row]) - 1]:
            alone = target.next(alone, target.embeddings[token])
        torch.testing.assert_close(target.states[row], alone)
    kept = target.states.clone()
    with torch.no_grad():
        executor.run(lambda phase: None)
    assert torch.equal(kept, target.states), "a step changes nothing of rows that are done"


def test_a_recurrent_step_can_be_captured():
    """By tape: the toy reads nothing on the host."""
    requests = [request(PROMPT, 14, 1), request(PROMPT[:2], 9, 2)]
    plain, _ = texts_of(Eager(engine_of(Recurrent(2), NoDrafter(), TreeShape.chain(0))), requests)
    tape = TapeExecutor(engine_of(Recurrent(2), NgramDrafter(), TreeShape.parse("2x2")))
    assert texts_of(tape, requests)[0] == plain and tape.replays > 3 and tape.tape.offences == []
