"""Engines made by hand from a target, a drafter and a tree, and the texts of their rows."""

import paceline
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines.runs import open_engine
from paceline.spec.noise import stream_key
from paceline.spec.proposal import NoDrafter
from paceline.spec.request import Request, RowSampling
from paceline.spec.rows import Rows
from paceline.spec.sampling import Sampler, warpers
from paceline.spec.tree import TreeShape
from paceline.spec.verify import draft_sampling

from support.models import eagle_copy, fitted_heads, noisy_copy

PROMPT = [5, 9, 33, 12, 7, 40, 5, 9, 33, 12]
BOTH = "3x2x1+chain:4"
DRAFTERS = {  # for a target: a drafter and a tree for it
    "none": lambda model: (NoDrafter(), TreeShape.chain(0)),
    "ngram": lambda model: (NgramDrafter(), TreeShape.parse("2x2")),
    "model": lambda model: (paceline.load_drafter(noisy_copy(model), model), TreeShape.parse("2x2x1")),
    "hydra": lambda model: (MedusaDrafter(fitted_heads(model, "hydra", steps=20)), TreeShape.parse("3x2x1")),
    "eagle beside": lambda model: (Beside(EagleDrafter(eagle_copy(model)), NgramDrafter()), TreeShape.parse(BOTH)),
}


def request(tokens, new_tokens, seed=0, temperature=0.0, ends=()):
    return Request(tokens, new_tokens, stream_key(seed), ends, RowSampling(temperature or 1.0, tail=1 - 0.9))


def engine_of(target, drafter, shape, temperature=0.0, eos=4):
    blank = torch.zeros(target.traits.batch, 0, dtype=torch.long)
    sampler = Sampler(warpers(temperature, 0.9), temperature > 0, blank, blank.sum(1))
    return open_engine(target, drafter, shape, sampler, draft_sampling("match", temperature > 0), "match", eos)


@torch.no_grad()
def texts_of(executor, requests):
    """What the rows generate for requests that begin together; and how many steps that took."""
    rows, steps = Rows(executor, chunk=4), 0
    rows.admit(dict(enumerate(requests)))
    texts = {}
    while rows.live:
        arrival, steps = rows.step(), steps + 1
        for row, report in arrival.ended.items():
            assert not report.failed
            texts[row] = rows.text(row)[len(requests[row].tokens) :]
    return [texts[row] for row in range(len(requests))], steps
