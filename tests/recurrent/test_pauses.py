"""Draft models with states after a stretch in which nothing was drafted, as a server's full batch has them."""

import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines.executors import Eager
from paceline.spec.rows import Rows
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TreeShape

from support.engines import PROMPT, engine_of, request
from support.models import noisy_copy

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = TreeShape.parse("2x1x1+chain:3")


def _rows(model, drafter, shape):
    return Rows(Eager(engine_of(SlotModel(model, 2, 64), drafter, shape)), chunk=4)


@torch.no_grad()
def test_they_go_on_from_the_text_as_ones_that_read_it_anew(stateful):
    """Two side by side, which hold unlike parts of it: drafting, none for three steps, and drafting again, in two rows
    of unlike length."""
    drafter = Beside(*(ModelDrafter(noisy_copy(stateful, seed=seed)) for seed in (1, 2)))
    rows = _rows(stateful, drafter, SHAPE)
    rows.admit({0: request(PROMPT, 30), 1: request(PROMPT[:3], 30)})
    rows.step(), rows.step()
    plain = rows.moved([0, 1], Eager(engine_of(SlotModel(stateful, 2, 64), drafter, TreeShape.chain(0))))
    plain.step(), plain.step(), plain.step()
    again = plain.moved([0, 1], Eager(engine_of(SlotModel(stateful, 2, 64), drafter, SHAPE)))
    again.catch_up([0, 1])
    anew = _rows(stateful, drafter, SHAPE)
    state = again.engine.state
    texts = [state.tokens[row, : int(state.lengths[row])].tolist() for row in range(2)]
    anew.admit({row: request(text, 9) for row, text in enumerate(texts)})
    proposals = [engine.session.propose(engine.state) for engine in (again.engine, anew.engine)]
    assert torch.equal(proposals[0].tokens, proposals[1].tokens)
    for one, other in zip(_states(again.engine.session), _states(anew.engine.session), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _states(session):
    return [part.state for each in session.sessions for part in each.slots.cache.states.parts]
