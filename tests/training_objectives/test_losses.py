"""The chunked losses against the formulas written out in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paceline.training.objectives.losses import NAMES, check_mixture, mixed_loss
from torch import nn


def obvious(name, p, q, label):
    """The loss of one token from probabilities p (V,) and q (V,)."""
    middle = (p + q) / 2
    if name == "forward_kl":
        return sum(pv * (pv / qv).log() for pv, qv in zip(p, q))
    if name == "reverse_kl":
        return sum(qv * (qv / pv).log() for pv, qv in zip(p, q))
    if name == "jsd":
        return (obvious("forward_kl", p, middle, label) + obvious("forward_kl", q, middle, label)) / 2
    if name == "total_variation":
        return sum((pv - qv).abs() for pv, qv in zip(p, q)) / 2
    if name == "acceptance":
        return -sum(torch.minimum(pv, qv) for pv, qv in zip(p, q)).log()
    return -q[label].log()


def reference(mixture, hidden, head, labels, target_hidden, target_head):
    total = 0
    for h, t, label in zip(hidden, target_hidden, labels):
        p, q = target_head(t).softmax(-1), head(h).softmax(-1)
        total = total + sum(weight * obvious(name, p, q, label) for name, weight in mixture.items())
    return total


def heads(seed, width=6, vocab=11, bias=True):
    torch.manual_seed(seed)
    return nn.Linear(width, vocab, bias=bias).double(), nn.Linear(width + 2, vocab).double().requires_grad_(False)


def states(tokens, width=6, vocab=11):
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    return hidden, torch.randn(tokens, width + 2, dtype=torch.float64), torch.randint(vocab, (tokens,))


@given(
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 10),
    weights=st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 3), min_size=1),
    seed=st.integers(0, 99),
)
def test_any_mixture_in_any_chunks_is_the_formula_with_its_gradients(tokens, chunk, weights, seed):
    head, target_head = heads(seed)
    hidden, target_hidden, labels = states(tokens)
    slow, fast = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    wanted = reference(weights, slow, head, labels, target_hidden, target_head)
    expected = torch.autograd.grad(3 * wanted, [slow, head.weight, head.bias])
    single = nn.Linear(6, 11)
    single.load_state_dict(head.state_dict())
    given_, top = mixed_loss(
        weights, fast.float(), single, labels, target_hidden.float(), target_head.float(), chunk=chunk
    )
    target_head.double()
    (3 * given_).backward()
    torch.testing.assert_close(given_.double(), wanted.detach(), rtol=2e-5, atol=2e-5)
    for mine, theirs in zip((fast.grad, single.weight.grad, single.bias.grad), expected):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-4, atol=2e-5)
    assert torch.equal(top, head(hidden).argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_cost_nothing_and_extreme_ones_stay_finite(name):
    head = nn.Linear(4, 11, bias=False)
    same = torch.randn(5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    if name != "cross_entropy":
        loss, _ = mixed_loss({name: 1.0}, same, head, labels, same, head.requires_grad_(False))
        assert abs(float(loss)) < 1e-5
    far = (1e3 * same).requires_grad_()
    loss, _ = mixed_loss({name: 1.0}, far, head, labels, -1e3 * same, head)
    loss.backward()
    assert loss.isfinite() and far.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient_and_evaluation_keeps_none():
    head = nn.Linear(4, 11).requires_grad_(False)
    hidden = torch.randn(5, 4, requires_grad=True)
    labels = torch.zeros(5, dtype=torch.int64)
    mixed_loss({"cross_entropy": 1.0}, hidden, head, labels)[0].backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        loss, _ = mixed_loss({"cross_entropy": 1.0}, hidden, head, labels)
    assert not loss.requires_grad
    empty = torch.randn(0, 4, requires_grad=True)
    loss, top = mixed_loss({"cross_entropy": 1.0}, empty, head, labels[:0])
    loss.backward()
    assert loss.item() == 0 and top.shape == (0,)


def test_no_tensor_of_tokens_times_vocabulary_is_made():
    """A dispatch mode looks at the shape of every result."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    head, theirs = nn.Linear(3, 101), nn.Linear(3, 101).requires_grad_(False)
    hidden = torch.randn(64, 3, requires_grad=True)
    labels = torch.randint(101, (64,))
    with Watch():
        loss, _ = mixed_loss(dict.fromkeys(NAMES, 1.0), hidden, head, labels, hidden.detach(), theirs, chunk=8)
        loss.backward()
    assert largest == 8 * 101


def test_mixtures_are_checked():
    assert check_mixture({"jsd": 1.0, "forward_kl": 0.0}) == {"jsd": 1.0}
    for mixture, message in (
        ({"kl": 1.0}, "unknown; choose of cross_entropy"),
        ({"jsd": -1.0}, "at least 0"),
        ({"jsd": 0.0}, "sum to zero"),
        ({}, "sum to zero"),
    ):
        with pytest.raises(ValueError, match=message):
            check_mixture(mixture)
