"""Engines whose steps are taken by hand, so that chance decides what is accepted and no drafter has to be right."""

import torch
from paceline.spec.step import write
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape
from paceline.spec.verify import Verdict

from support.engines import engine_of, request

TEXTS = [[5, 9, 33, 12, 7, 40, 5, 9, 33], [8, 20, 31, 44], [17]]


@torch.no_grad()
def opened(model, drafter, tree, texts=TEXTS, chunk=3, temperature=0.0):
    """An engine that has read ragged `texts` in chunks."""
    target = SlotModel(model, len(texts), 64, drafter.traits.taps)
    engine = engine_of(target, drafter, TreeShape.parse(tree), temperature)
    requests = [request(text, 40, seed) for seed, text in enumerate(texts)]
    engine.state.admit(torch.arange(len(texts)), requests, [1] * len(texts))
    engine.read(chunk)
    return engine


@torch.no_grad()
def step_by_chance(engine, generator):
    """A step that accepts any path of the proposal; returns how many drafted tokens each row accepted."""
    state, base = engine.state, engine.state.lengths - 1
    proposal = engine.session.propose(state)
    seen, tree, rows = engine.target.forward(proposal, base), proposal.tree, torch.arange(len(base))
    paths = tree.paths.expand(len(rows), -1, -1)  # (B, N, D+1)
    tokens = proposal.tokens[:, None].expand(-1, tree.size, -1).gather(2, paths)
    drafted = (tokens >= 0).all(-1)  # of which all tokens are there
    depths = tree.depths.expand(len(rows), -1)
    chances = torch.rand(paths.shape, generator=generator)[:, 0].gather(1, depths)  # the same for nodes of a level
    node = ((chances + 1e-3 * torch.rand(chances.shape, generator=generator)) * drafted).argmax(-1)
    path, accepted = paths[rows, node], depths[rows, node]
    bonus = torch.randint(5, 9, (len(rows),), generator=generator)
    columns = torch.arange(path.shape[1])
    following = torch.cat([tokens[rows, node][:, 1:], bonus[:, None]], dim=1)
    following = torch.where(columns == accepted[:, None], bonus[:, None], following)
    write(state, Verdict(accepted, path, following, bonus, torch.zeros_like(state.failed)))
    engine.target.commit(base, path, state.committed)
    engine.session.follow(base, path, state.committed, seen.features)
    return accepted


def texts_of(engine):
    state = engine.state
    return [row[:length] for row, length in zip(state.tokens.tolist(), state.lengths.tolist())]
