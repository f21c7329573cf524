"""Losses between a draft's and the target's next-token distributions, chunk by chunk over tokens.

With p the target's probabilities, q the draft's and y the text's token, per token:

    forward_kl       KL(p || q)                       classic distillation
    reverse_kl       KL(q || p)                       (DistillSpec, arXiv:2310.08461, compares the divergences)
    jsd              half KL(p || m) + half KL(q || m), m = (p + q) / 2
    total_variation  half the sum of |p - q|: one minus the acceptance rate (Leviathan et al., arXiv:2211.17192)
    acceptance       -log of the sum of min(p, q): the acceptance rate itself (LK losses, arXiv:2602.23881)
    cross_entropy    -log q(y)

No (tokens, vocabulary) tensor is larger than one chunk: its gradients are computed at once, in the forward, and
only those of the hidden states and of the head's weights are kept. Knows nothing of batches.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def forward_kl(target: Tensor, draft: Tensor) -> Tensor:
    """From log-probabilities (N, V) and (N, V) to (N,), like all that follow."""
    return (target.exp() * (target - draft)).sum(-1)


def reverse_kl(target: Tensor, draft: Tensor) -> Tensor:
    return forward_kl(draft, target)


def jsd(target: Tensor, draft: Tensor) -> Tensor:
    middle = torch.logaddexp(target, draft) - math.log(2)
    return (forward_kl(target, middle) + forward_kl(draft, middle)) / 2


def total_variation(target: Tensor, draft: Tensor) -> Tensor:
    return (target.exp() - draft.exp()).abs().sum(-1) / 2


def acceptance(target: Tensor, draft: Tensor) -> Tensor:
    return -torch.logsumexp(torch.minimum(target, draft), dim=-1)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "acceptance": acceptance,
}
NAMES = ("cross_entropy", *DIVERGENCES)
SOFT = ("forward_kl", "cross_entropy")  # are linear in log q, and so have one cheap gradient


def check_mixture(mixture: dict[str, float]) -> dict[str, float]:
    """The losses of weight above 0. Raises ValueError for unknown names, negative weights and where none is left."""
    for name, weight in mixture.items():
        if name not in NAMES:
            raise ValueError(f"loss {name!r} is unknown; choose of {', '.join(NAMES)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"loss {name} has weight {weight}; weights are at least 0")
    if not sum(mixture.values()):
        raise ValueError(f"the weights of the losses {list(mixture)} sum to zero; give at least one of them weight")
    return {name: weight for name, weight in mixture.items() if weight}


def mixed_loss(
    mixture: dict[str, float],
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    target_hidden: Tensor | None = None,
    target_head: nn.Module | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses over N tokens, a float32 scalar, and the draft's top-1 tokens (N,).

    `hidden` (N, H) goes through the draft's `head`, `target_hidden` (N, H') through the frozen `target_head`;
    the latter two may be None for a mixture of cross-entropy alone. `labels` (N,) are the text's tokens."""
    top = torch.zeros_like(labels)

    def loss_of(part: slice, states: Tensor) -> tuple[Tensor]:
        logits = head(states).float()  # (n, V)
        top[part] = logits.argmax(-1)
        log_probs = logits.log_softmax(-1)
        divergences = [name for name in mixture if name != "cross_entropy"]
        loss = logits.new_zeros(())
        if "cross_entropy" in mixture:
            picked = log_probs.gather(1, labels[part, None])
            loss = loss - mixture["cross_entropy"] * picked.sum()
        if divergences:
            with torch.no_grad():
                target_log_probs = target_head(target_hidden[part]).float().log_softmax(-1)
            for name in divergences:
                loss = loss + mixture[name] * DIVERGENCES[name](target_log_probs, log_probs).sum()
        return (loss,)

    parts = ((slice(start, start + chunk),) for start in range(0, len(hidden), chunk))
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]
    zeros = [hidden.new_zeros((), dtype=torch.float32)]
    (total,) = Summed.apply(loss_of, parts, zeros, hidden, *weights)
    return total, top


class SoftCrossEntropy(torch.autograd.Function):
    """The sum over tokens of -`wanted` log softmax(`logits`), and the tokens (n,) of the highest logits. `wanted` is
    at least 0 and need not sum to 1. Computed in the dtype of the logits, with few passes over them."""

    @staticmethod
    def forward(ctx, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.softmax(-1)
        highest, top = logits.max(-1)
        # log sum exp, from the highest logit and its probability
        normaliser = highest.to(wide) - probabilities.gather(1, top[:, None])[:, 0].to(wide).log()
        mass = wanted.sum(-1, dtype=wide)  # (n,)
        total = (mass * normaliser).sum() - (wanted * logits).sum(dtype=wide)
        ctx.save_for_backward(probabilities.mul_(mass[:, None]).sub_(wanted))
        ctx.mark_non_differentiable(top)
        return total, top

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


class Summed(torch.autograd.Function):
    """Sums `loss_of(*chunk) -> (loss, *counts)` over `chunks`. The gradient of each chunk is computed at once, so that
    no chunk is kept or recomputed. Chunks of `states` (N, ...) begin with their slice, and `loss_of` is given these
    states last. The first sum is differentiable with respect to `states` and `parameters`."""

    @staticmethod
    def forward(
        ctx, loss_of: Callable, chunks: Iterable[tuple], zeros: list[Tensor], states: Tensor | None, *parameters: Tensor
    ):
        needed = any(ctx.needs_input_grad)
        of_states = torch.zeros_like(states) if ctx.needs_input_grad[3] else None
        sums, gradients = list(zeros), [torch.zeros_like(each) for each in parameters] if needed else []
        for chunk in chunks:
            pieces = [] if states is None else [states[chunk[0]].detach().requires_grad_(of_states is not None)]
            with torch.set_grad_enabled(needed):
                losses = loss_of(*chunk, *pieces)
            sums = [so_far + new.detach() for so_far, new in zip(sums, losses)]
            if not needed:
                continue
            leaves = [*(pieces if of_states is not None else ()), *parameters]
            gradients_of_chunk = list(torch.autograd.grad(losses[0], leaves, allow_unused=True))
            if of_states is not None:
                of_states[chunk[0]] = gradients_of_chunk.pop(0)
            for sum_, gradient in zip(gradients, gradients_of_chunk):
                if gradient is not None:
                    sum_ += gradient
        ctx.gradients = of_states, *gradients
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        return None, None, None, *(None if each is None else each.mul_(grad) for each in ctx.gradients)
