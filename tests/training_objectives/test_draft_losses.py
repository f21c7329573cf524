"""What small draft models are trained on and judged by: losses and statistics against the obvious ones."""

import pytest
import torch
from paceline.training.objectives.draft_lm import chain_statistics, next_tokens
from paceline.training.objectives.objective import NO_LABEL, acceptance
from paceline.training.objectives.target import OnlineTarget

from support.draft_lms import SIZES, build


def obvious_statistics(objective, batch, depths):
    """Position by position: walk along the text as long as the draft is right and tokens count."""
    hits, tried = [0] * depths, [0] * depths
    for ids, mask, document in zip(batch["input_ids"], batch["loss_mask"], batch["document"]):
        for start in range(len(ids) - 1):
            for depth in range(depths):
                here = start + depth
                if here + 1 >= len(ids) or document[here] != document[here + 1] or document[here] < 0:
                    break
                if not mask[here + 1]:
                    break
                tried[depth] += 1
                text = ids[: here + 1][document[: here + 1] == document[here]]
                if objective.model(input_ids=text[None]).logits[0, -1].argmax() != ids[here + 1]:
                    break
                hits[depth] += 1
    return hits, tried


@torch.no_grad()
def test_statistics_and_ranks_are_those_of_a_walk_along_the_text(model, batch):
    objective = build(model, sizes=SIZES, depths=3, chunk=5).eval()
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    for _ in range(25):  # until it is right now and then
        with torch.enable_grad():
            losses = objective(batch, None)
            (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = objective(batch, None)
    hits, tried = obvious_statistics(objective, batch, 3)
    assert losses.hits.tolist() == hits and losses.tried.tolist() == tried and 0 < hits[2] < tried[0]
    assert losses.counted == tried[0]
    measured = acceptance(objective, [(batch, None)], width=2)
    assert [row[0] for row in measured.hits][:1] == hits[:1] and measured.trials[0][0] == tried[0]
    ranks = objective.label_ranks(batch, None)
    assert ranks.shape == (tried[0], 3) and (ranks[:, 0] != NO_LABEL).all()
    best = ranks == 0
    assert [int(best[:, : depth + 1].all(1).sum()) for depth in range(3)] == hits


def test_only_the_targets_own_tokens_of_the_same_document_count(batch):
    labels, counted = next_tokens(batch)
    assert torch.equal(labels, batch["input_ids"][:, 1:])
    for row in range(len(labels)):
        for place in range(labels.shape[1]):
            document = batch["document"][row, place : place + 2].tolist()
            wanted = document[0] == document[1] >= 0 and batch["loss_mask"][row, place + 1] == 1
            assert bool(counted[row, place]) == wanted
    one = torch.ones(1, 2, dtype=torch.bool)
    hits, tried = chain_statistics(one, one, 4)
    assert hits.tolist() == tried.tolist() == [2, 1, 0, 0], "deeper than the text is long"


@pytest.mark.parametrize("losses", [{"cross_entropy": 1.0}, {"forward_kl": 1.0, "jsd": 0.5}])
def test_the_loss_is_the_obvious_one(model, batch, losses):
    objective = build(model, sizes=SIZES, losses=losses, chunk=4)
    assert objective.taps == (() if "cross_entropy" in losses else ("head",))
    seen = OnlineTarget(model).view(batch, "train", [0, 1, 2])
    given = objective(batch, seen if objective.taps else None)
    labels, counted = next_tokens(batch)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    q = objective.model(**inputs).logits[:, :-1][counted].double().log_softmax(-1)
    p = model(**inputs).logits[:, :-1][counted].double().log_softmax(-1)
    if "jsd" in losses:
        m = ((p.exp() + q.exp()) / 2).log()
        kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
        wanted = kl(p, q) + 0.5 * (kl(p, m) + kl(q, m)) / 2
    else:
        wanted = -q.gather(1, labels[counted][:, None]).sum()
    torch.testing.assert_close(given.total.double(), wanted, rtol=1e-4, atol=1e-4)
