"""The objective of heads against a slow reference: labels, losses, acceptance."""

import math

import pytest
import torch
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaHeads
from paceline.spec.target.taps import HEAD
from paceline.training.objectives import heads as heads_objective
from paceline.training.objectives.heads import MedusaObjective
from paceline.training.objectives.objective import NO_LABEL, Losses, acceptance, labelled
from paceline.training.objectives.target import ScaledHead

from support.models import fitted_heads, target_view, whole_rows
from support.packed import packed, view_of

MODES = ["independent", "markov", "hydra"]


def slow_labels(batch, row, place, depths):
    """How many guesses at `place` are judged, by the definition."""
    document, own = batch["document"][row].tolist(), batch["loss_mask"][row].tolist()
    if document[place] < 0 or place + 1 >= len(own) or document[place + 1] != document[place]:
        return 0
    count = 0
    while count < depths:
        label = place + 2 + count
        if label >= len(own) or document[label] != document[place] or not own[label]:
            break
        count += 1
    return count


def slow_losses(objective, batch, seen):
    """Position by position and head by head, as the formulas say."""
    heads, known = objective.heads, objective.heads.vocabulary.tolist()
    total, counted = 0.0, 0
    hits, tried = [0] * objective.depths, [0] * objective.depths
    for row, text in enumerate(batch["input_ids"].tolist()):
        for place in range(len(text)):
            right = True
            for depth in range(slow_labels(batch, row, place, objective.depths)):
                path, label = text[place + 1 : place + 2 + depth], text[place + 2 + depth]
                started = heads.start(seen.hidden[row, place])
                logits = heads.follow(started, depth, torch.tensor(path)).double()
                law = logits.log_softmax(-1)
                loss = 0.0
                if label in known:
                    loss -= objective.label_weight * law[known.index(label)]
                if objective.target_weight:
                    target = seen.lm_head(seen.hidden[row, place + 1 + depth])[known].double().softmax(-1)
                    loss += objective.target_weight * (target * (target.log() - law)).sum()
                counted += 1 if objective.target_weight else label in known
                total = total + objective.decay ** (depth + 1) * loss
                tried[depth] += right
                right = right and known[int(logits.argmax())] == label
                hits[depth] += right
    return total, counted, hits, tried


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("known", [None, 30])
@pytest.mark.parametrize("mode", MODES)
def test_losses_equal_the_slow_reference(target, monkeypatch, mode, known, weights):
    batch = packed()
    seen = view_of(target, batch)
    heads = fitted_heads(target, mode, steps=3, known=known)
    objective = MedusaObjective(heads, *weights)
    total, counted, hits, tried = slow_losses(objective, batch, seen)
    slow = torch.autograd.grad(total, list(objective.parameters()), allow_unused=True)
    for chunk in (heads_objective._CHUNK, 1):  # all positions at once; one at a time
        monkeypatch.setattr(heads_objective, "_CHUNK", chunk)
        objective.zero_grad()
        losses = objective(batch, seen)
        losses.total.backward()
        assert torch.allclose(losses.total.double(), total, rtol=1e-5)
        assert (int(losses.counted), losses.hits.tolist(), losses.tried.tolist()) == (counted, hits, tried)
        for parameter, grad in zip(objective.parameters(), slow):
            assert torch.allclose(parameter.grad, grad, atol=1e-4), "gradients too, of every parameter"


def test_the_law_of_a_target_that_scales_its_logits_is_scaled_too(target):
    batch = packed()
    seen = view_of(target, batch)
    seen.lm_head = ScaledHead(seen.lm_head, 0.25, 2.0)
    objective = MedusaObjective(fitted_heads(target, "markov", steps=3, known=30), 0.0, 1.0)
    assert torch.allclose(objective(batch, seen).total.double(), slow_losses(objective, batch, seen)[0], rtol=1e-5)


def test_labels_are_the_targets_own_tokens_of_one_document():
    batch = packed()
    judged = labelled(batch, 3)
    for row in range(2):
        for place in range(14):
            count = slow_labels(batch, row, place, 3)
            assert judged[row, place].tolist() == [True] * count + [False] * (3 - count)
    assert judged[0, 1].tolist() == [True] * 3, "the first answer token is guessed from the last prompt token but one"
    assert judged[0, 0].tolist() == [False] * 3, "a prompt token is never guessed, nor what stands behind it"
    assert judged[0, 6].tolist() == [False] * 3, "not across documents"
    assert judged[1, 9:].sum() == 0, "not in padding, whatever its mask says"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_labels_and_the_text_before_them_matters(target, mode):
    """Tokens that are no label and stand on no path, and states that nothing is guessed from, change nothing."""
    batch = packed()
    objective = MedusaObjective(fitted_heads(target, mode, steps=3))
    seen = view_of(target, batch)
    before = objective(batch, seen)
    judged = labelled(batch, 3)
    used = torch.zeros(2, 14, dtype=torch.bool)
    for row, place, depth in judged.nonzero().tolist():
        used[row, place + 1 : place + 3 + depth] = True
    assert (~used).sum() > 6
    batch["input_ids"] = torch.where(used, batch["input_ids"], 60)
    seen.tapped[HEAD] = torch.where(judged.any(-1)[..., None], seen.hidden, 1e3)
    after = objective(batch, seen)
    assert torch.equal(before.total, after.total) and torch.equal(before.hits, after.hits)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_labels_gives_zero_and_zero_gradients(target, mode):
    batch = packed()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, own_heads=True), target))
    losses = objective(batch, view_of(target, batch))
    losses.total.backward()
    assert losses.total.item() == int(losses.counted) == int(losses.tried.sum()) == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in objective.parameters())
    assert objective.label_ranks(batch, view_of(target, batch)).shape == (0, 4)


def test_labels_that_the_heads_do_not_know_count_as_misses(target):
    batch = packed()
    batch["input_ids"] = batch["input_ids"] % 20 + 1
    heads = MedusaHeads.make(HeadSettings(heads=3), target, torch.arange(40, 50))
    losses = MedusaObjective(heads)(batch, view_of(target, batch))
    assert losses.total.item() == int(losses.counted) == 0
    assert int(losses.tried[0]) == int(labelled(batch, 3)[..., 0].sum()) and not losses.hits.any()
    ranks = MedusaObjective(heads).label_ranks(batch, view_of(target, batch))
    assert set(ranks.flatten().tolist()) == {61, NO_LABEL}
    counts = acceptance(MedusaObjective(heads), [(batch, view_of(target, batch))], width=20)
    assert not any(map(any, counts.hits)), "nor is an unknown token a child of any rank"


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(target, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (61,) and tensor.ndim > 1:
                    largest = max(largest, tensor.numel() // 61)
            return out

    text = torch.randint(1, 61, (4, 64))
    monkeypatch.setattr(heads_objective, "_CHUNK", 61 * 3 * 10)
    for mode in MODES:
        objective = MedusaObjective(MedusaHeads.make(HeadSettings(mode, heads=3, rank=8), target), 1.0, 1.0)
        seen = target_view(target, text)
        with Sizes():
            objective(whole_rows(text), seen).total.backward()
    assert 10 <= largest <= 61, "a chunk of ten positions and three heads, and the LM head itself"


def test_estimated_tokens_per_step_is_one_plus_the_products():
    losses = Losses(torch.zeros(()), torch.tensor(8), torch.tensor([6, 3, 0]), torch.tensor([8, 6, 3]))
    assert math.isclose(losses.tokens_per_step(), 1 + 0.75 + 0.75 * 0.5)
    assert Losses(*[torch.zeros(2)] * 4).tokens_per_step() == 1


def test_acceptance_counts_what_ranks_say(target):
    """Against counting in plain Python, over two batches."""
    objective = MedusaObjective(fitted_heads(target, "hydra", known=40))
    batches = [packed(), whole_rows(torch.randint(1, 61, (3, 20)))]
    views = [(batch, target_view(target, batch["input_ids"])) for batch in batches]
    for width in (1, 4, 61):
        counts = acceptance(objective, iter(views), width)
        hits, trials = [[0] * width for _ in range(3)], [0] * 3
        for batch, seen in views:
            for ranks in objective.label_ranks(batch, seen).tolist():
                for depth, rank in enumerate(ranks):
                    if rank == NO_LABEL:
                        break
                    trials[depth] += 1
                    if rank >= min(width, 40):
                        break
                    hits[depth][rank] += 1
        assert counts.hits == hits and counts.trials == [[trial] * width for trial in trials]
        assert all(sum(row) <= 1 + 1e-9 for row in counts.rates(weight=0))
    losses = [objective(*view) for view in views]
    counts = acceptance(objective, views, 1)
    assert [row[0] for row in counts.hits] == sum(loss.hits for loss in losses).tolist(), "first guesses, both ways"
    assert [row[0] for row in counts.trials] == sum(loss.tried for loss in losses).tolist()
