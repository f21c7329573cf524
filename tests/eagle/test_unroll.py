"""The unroll of EAGLE's training against explicit chains, one for each draft: states, losses and gradients."""

import pytest
import torch
from eagle.chains import documents, losses_of_chains, states_of_chain
from paceline.spec.target.taps import HEAD
from paceline.training.objectives.eagle import EagleObjective, Settings, text_ranks
from paceline.training.objectives.eagle_unroll import Text, unroll
from paceline.training.objectives.objective import NO_LABEL, TargetView

from support.models import random_eagle, tiny_llama
from support.packed import packed

LAYOUTS = {
    "joined": dict(embedding_norm=True, feature_norm=True, norm_output=True),
    "eagle1": dict(input_norm=False, final_norm=False, join_bias=True),
    "two layers": dict(layer={"num_hidden_layers": 2}, taps=[1, HEAD]),
    "wide": dict(wide=True, taps=[0, 1, HEAD], layer={"num_hidden_layers": 2}),
    "eagle3.1": dict(wide=True, taps=[0, 1], tap_norms=True, norm_output=True, own_head=True, own_embeddings=True),
    "qwen3": dict(layer={"model_type": "qwen3", "head_dim": 6}, embedding_norm=True),
}
KNOWN = torch.arange(2, 61, 2)


@pytest.fixture(scope="module")
def target():
    """In float64, where nothing hides behind rounding."""
    return tiny_llama().double()


def seen_of(model, batch):
    """Some hidden states at every tap; nothing here asks where they come from."""
    generator = torch.Generator().manual_seed(10)
    states = {tap: torch.randn(*batch["input_ids"].shape, 32, generator=generator).double() for tap in (0, 1, HEAD)}
    return TargetView(states, model.lm_head)


def objective_of(target, layout, own_head=False, **settings):
    network = random_eagle(target, **{"known": KNOWN, "own_head": own_head, **LAYOUTS[layout]})
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(network.settings.own_head or not name.startswith("lm_head"))
    return EagleObjective(network, Settings(**settings))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_is_that_of_a_chain_of_its_own(target, layout):
    network, batch = random_eagle(target, **LAYOUTS[layout]), packed()
    seen, taps = seen_of(target, batch), network.settings.taps
    text = Text.of(batch, seen, taps, 3)
    columns = text.columns()
    unrolled = list(unroll(network, text, columns, 3))
    expected = []
    for tokens, features, _, judged in documents(batch, seen, taps):
        for root in judged[:, 0].nonzero()[:, 0].tolist():
            chain = states_of_chain(network, tokens, features, root, 3)
            expected.append([torch.stack(both) for both in chain])
    assert len(expected) == len(columns) > 8
    for column, chain in enumerate(expected):
        for step, both in enumerate(chain):
            if text.judged[columns[column], step]:
                mine = torch.stack([states[column] for states in unrolled[step]])
                torch.testing.assert_close(mine, both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "losses", [{"forward_kl": 1.0}, {"cross_entropy": 1.0}, {"forward_kl": 0.7, "cross_entropy": 0.3}]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_plain_autograd(target, layout, losses):
    batch, feature = packed(), 0.5 * (layout == "joined")
    objective = objective_of(target, layout, losses=losses, feature_weight=feature, steps=3, decay=0.7, chunk=3)
    seen, trained = seen_of(target, batch), [p for p in objective.parameters() if p.requires_grad]
    expected = losses_of_chains(objective, batch, seen)
    gradients = torch.autograd.grad(expected, trained, allow_unused=True)
    total, counted, _, tried = objective.train()(batch, seen)
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert counted == tried[0] > 8
    for parameter, gradient in zip(trained, gradients):
        expected_gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-5, atol=1e-5)
    assert not any(p.grad is not None for p in objective.parameters() if not p.requires_grad)


def test_the_statistics_are_those_of_chains_and_ranks(target):
    """Hits, tries and ranks, from the logits of every chain; in evaluation as deep as is asked for. The network drafts
    the token that it read last, and the text often says it again."""
    batch = packed()
    batch["input_ids"][torch.rand(2, 14) < 0.8] = 6
    objective = objective_of(target, "joined", steps=2, depths=4, own_head=True).eval()
    seen, network = seen_of(target, batch), objective.network
    with torch.no_grad():
        for name, parameter in network.layers.named_parameters():
            parameter.mul_(0.01 if "proj" in name else 1.0)
        network.join.weight.copy_(torch.cat([torch.eye(32), torch.zeros(32, 32)], 1))
        network.lm_head.weight.copy_(network.embeddings[KNOWN])
    ranks, hits, tried = [], torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        for tokens, features, _, judged in documents(batch, seen, (HEAD,)):
            for root in judged[:, 0].nonzero()[:, 0].tolist():
                alive, row = True, []
                for step, (states, _) in enumerate(states_of_chain(network, tokens, features, root, 4)):
                    if not judged[root, step]:
                        row.append(NO_LABEL)
                        continue
                    logits, token = network.lm_head(states), int(tokens[root + 2 + step])
                    known = KNOWN.tolist()
                    rank = int((logits > logits[known.index(token)]).sum()) if token in known else 61
                    row.append(rank)
                    tried[step] += alive
                    alive = alive and rank == 0
                    hits[step] += alive
                ranks.append(row)
        losses = objective(batch, seen)
        assert objective.label_ranks(batch, seen).tolist() == ranks
    assert losses.hits.tolist() == hits.tolist() and losses.tried.tolist() == tried.tolist() and hits[1] > 0
    losses = objective.train()(batch, seen)
    assert losses.tried.tolist() == [*tried[:2].tolist(), 0, 0], "and in training as deep as it is trained"


def test_documents_do_not_see_each_other(target):
    """Other tokens and states in one document change nothing in the next, nor in another row."""
    network, batch = random_eagle(target, **LAYOUTS["joined"]), packed()
    seen = seen_of(target, batch)
    before = text_ranks(network, batch, seen, 3)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    first = (batch["document"] == 0) & (torch.arange(2)[:, None] == 0)
    changed["input_ids"][first] = 7
    states = {tap: torch.where(first[..., None], 100.0, state) for tap, state in seen.tapped.items()}
    after = text_ranks(network, changed, TargetView(states, seen.lm_head), 3)
    here = Text.of(batch, seen, (HEAD,), 3)
    mine = here.columns() < here.lengths[0]
    assert torch.equal(before[~mine], after[~mine]) and not torch.equal(before[mine], after[mine])


def test_a_batch_without_labels_has_no_loss_and_all_gradients(target):
    objective, batch = objective_of(target, "joined"), packed()
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    losses = objective(batch, seen_of(target, batch))
    losses.total.backward()
    assert losses.total == losses.counted == 0 and losses.hits.shape == losses.tried.shape == (4,)
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters() if p.requires_grad)
    assert objective.label_ranks(batch, seen_of(target, batch)).shape == (0, 4)
