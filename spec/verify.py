"""Verification rules: which drafted tokens are accepted, and which token the target adds (the bonus).

    match      the target draws its next token at every node; the deepest node whose whole path equals these draws is
               accepted, and the draw there is the bonus. For any proposal. Lossless: the same text for a seed.
    residual   recursive rejection sampling over children drawn without replacement (Sequoia, arXiv:2402.12374,
               section 3.2; on a chain: Leviathan et al., arXiv:2211.17192). Lossless in distribution.
    typical    Medusa's typical acceptance (arXiv:2401.10774, section 2.3.1). Not lossless.

At temperature 0 a draw is an argmax, and all three are `match`. A rule knows nothing of drafters; it refuses proposals
that it cannot verify. Nothing here reads a value on the host, except `walk`, which is `match` for trees whose scores
are too many to exist together: it asks for those of one node after another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .proposal import Coupling, DraftSampling, Proposal

TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3  # Medusa's published thresholds


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The outcome of one step; D is the tree's depth."""

    accepted: Tensor  # (B,): accepted draft tokens, 0..D
    path: Tensor  # (B, D+1): accepted nodes from the root on, the last repeated
    tokens: Tensor  # (B, D+1): accepted tokens, then the bonus, then the bonus repeated
    bonus: Tensor  # (B,)
    failed: Tensor  # (B,) bool: NaN or no possible token at the last accepted node

    @classmethod
    def at(cls, node: Tensor, bonus: Tensor, best: Tensor, proposal: Proposal) -> "Verdict":
        """Accept the path to `node` (B,); `best` (B,) is the bonus token's perturbed score."""
        rows = torch.arange(len(node), device=node.device)
        tree = proposal.tree
        shared = rows.clamp(max=len(tree.paths) - 1)
        path = tree.paths[shared, node]  # (B, D+1)
        accepted = tree.depths[shared, node]
        tokens = torch.cat([proposal.tokens.gather(1, path)[:, 1:], bonus[:, None]], dim=1)
        levels = torch.arange(path.shape[1], device=node.device)
        tokens = torch.where(levels < accepted[:, None], tokens, bonus[:, None])
        return cls(accepted, path, tokens, bonus, ~(best > -torch.inf))


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: its function and its guarantees."""

    function: Callable[[Tensor, Proposal, Tensor, Tensor], Verdict]  # (scores, proposal, keys, base)
    lossless: bool  # the text has the target's distribution
    same_text: bool  # for a seed the text equals that of plain decoding
    coupling: Coupling  # whose noise drafts are drawn with


def verify(rule: str, scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor, sampling: bool) -> Verdict:
    """Apply `rule` to processed scores (B, N, V) of a proposal whose root is at position `base` (B,).

    `keys` (B, 2) are the rows' noise streams; without `sampling` every draw is an argmax. Raises
    ValueError for a proposal that the rule cannot treat.
    """
    check(rule, proposal, sampling)
    return RULES[rule].function(scores, proposal, keys, base) if sampling else _argmax(scores, proposal, keys, base)


def draft_sampling(rule: str, do_sample: bool) -> DraftSampling:
    """How drafts for a rule are drawn: greedily, or with the noise that the rule asks for (`coupling`)."""
    return DraftSampling(RULES[rule].coupling if do_sample else "none")


def check_rule(rule: str) -> None:
    """Raise ValueError for a name that is no rule."""
    if rule not in RULES:
        raise ValueError(f"verify={rule!r} is not a rule; choose one of {', '.join(RULES)}")


def check(rule: str, proposal: Proposal, sampling: bool) -> None:
    """Raise ValueError for a proposal that the rule cannot verify losslessly."""
    check_rule(rule)
    if rule != "residual" or not sampling or proposal.tree.size == 1:
        return
    if proposal.law == "deterministic":
        problem = "this drafter proposes tokens without drawing them"
    elif proposal.coupling == "shared":
        problem = "these were drawn with the target's noise, which is not independent of the target's draws"
    elif proposal.law == "iid" and proposal.tree.max_children > 1:
        problem = "these siblings were drawn with replacement"
    elif proposal.draft_logits is None:
        problem = "this drafter hands over no probabilities"
    else:
        return
    raise ValueError(
        "verify='residual' needs drafts drawn from known probabilities with the drafter's own noise, without "
        f"replacement among siblings, but {problem}; use verify='match'"
    )


def _next_positions(base: Tensor, proposal: Proposal) -> Tensor:
    """The position of the token after each depth, (B, D+1)."""
    return base[:, None] + 1 + torch.arange(proposal.tree.max_depth + 1, device=base.device)


def _target_draws(
    scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor, sampling: bool
) -> tuple[Tensor, Tensor]:
    """The target's own next token at every node: best perturbed scores and tokens, both (B, N)."""
    if sampling:
        vocab = torch.arange(scores.shape[-1], device=scores.device)
        per_depth = noise.gumbel(keys, _next_positions(base, proposal), noise.TARGET, vocab)  # (B, D+1, V)
        rows = torch.arange(len(base), device=base.device)[:, None]
        scores = scores + per_depth[rows, proposal.tree.depths]
    return scores.max(-1)


def _deepest(stands: Tensor, proposal: Proposal, value: Tensor | None = None) -> Tensor:
    """The deepest node, (B,), whose path is all True in `stands` (B, N); ties go to the larger `value` (B, N)."""
    tree = proposal.tree
    whole = (stands[:, None, :] | ~tree.ancestors).all(-1)  # (B, N)
    depth = torch.where(whole, tree.depths, -1)
    if value is None:
        return depth.argmax(-1)
    deepest = depth == depth.amax(-1, keepdim=True)
    return torch.where(deepest, value, -torch.inf).argmax(-1)


def _argmax(scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor) -> Verdict:
    return _match(scores, proposal, keys, base, sampling=False)


def _match(scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor, sampling: bool = True) -> Verdict:
    best, draws = _target_draws(scores, proposal, keys, base, sampling)
    parents = proposal.tree.parents.clamp(min=0).expand_as(draws)
    stands = (draws.gather(1, parents) == proposal.tokens) & (best.gather(1, parents) > -torch.inf)
    stands[:, 0].fill_(True)
    node = _deepest(stands, proposal)
    pick = node[:, None]
    return Verdict.at(node, draws.gather(1, pick)[:, 0], best.gather(1, pick)[:, 0], proposal)


def walks(rule: str, sampling: bool) -> bool:
    """Whether `walk` gives the verdict of `rule`."""
    return rule == "match" or not sampling


def walk(
    scores_at: Callable[[Tensor, Tensor], Tensor], proposal: Proposal, keys: Tensor, base: Tensor, live: Tensor,
    sampling: bool,
) -> Verdict:  # fmt: skip
    """The verdict of `match` from `scores_at(node, going)`, the scores (B, V) at one `node` (B,) of each row, which
    matter only in rows that are `going` (B,), as at first all `live` ones are. Waits for the host after every node."""
    tree = proposal.tree
    index, parents = torch.arange(tree.size, device=base.device), tree.parents.clamp(min=0).expand_as(proposal.tokens)
    whole = (tree.depths == 0).expand_as(proposal.tokens)  # (B, N): the nodes of this depth whose paths were drawn
    node, going = torch.zeros_like(base), live
    bonus, best = torch.zeros_like(base), torch.zeros(base.shape, device=base.device)
    for depth in range(tree.max_depth + 1):
        scores = scores_at(node, going)  # (B, V)
        if sampling:
            vocab = torch.arange(scores.shape[-1], device=base.device)
            scores = scores + noise.gumbel(keys, base[:, None] + 1 + depth, noise.TARGET, vocab)[:, 0]
        value, draw = scores.max(-1)
        bonus, best = torch.where(going, draw, bonus), torch.where(going, value, best)
        whole = whole.gather(1, parents) & (tree.depths == depth + 1) & (proposal.tokens == draw[:, None])
        going = going & whole.any(-1) & (value > -torch.inf)
        if not going.any():
            break
        node = torch.where(going, torch.where(whole, index, tree.size).amin(-1), node)
    return Verdict.at(node, bonus, best, proposal)


def _typical(scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor) -> Verdict:
    best, draws = _target_draws(scores, proposal, keys, base, sampling=True)
    log_probs = scores.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)  # (B, N)
    threshold = (TYPICAL_DELTA * (-entropy).exp()).clamp(max=TYPICAL_EPSILON)
    parents = proposal.tree.parents.clamp(min=0).expand_as(draws)
    rows = torch.arange(len(base), device=base.device)[:, None]
    log_prob = log_probs[rows, parents, proposal.tokens.clamp(min=0)]  # (B, N)
    stands = (log_prob.exp() > threshold.gather(1, parents)) & (proposal.tokens >= 0)
    stands[:, 0].fill_(True)
    log_prob[:, 0].fill_(0)
    finite = log_prob.clamp(min=torch.finfo(log_prob.dtype).min)
    path_log_prob = (finite[:, None, :] * proposal.tree.ancestors).sum(-1)
    node = _deepest(stands, proposal, path_log_prob)
    pick = node[:, None]
    return Verdict.at(node, draws.gather(1, pick)[:, 0], best.gather(1, pick)[:, 0], proposal)


def _residual(scores: Tensor, proposal: Proposal, keys: Tensor, base: Tensor) -> Verdict:
    """Walk down from the root; at each node try the children one by one, in the order in which they were drawn."""
    tree = proposal.tree
    rows = torch.arange(len(base), device=base.device)
    positions = _next_positions(base, proposal)
    ranks = torch.arange(max(tree.max_children, 1), device=base.device)
    index = torch.arange(tree.size, device=base.device)
    coins = noise.uniform(keys, positions, noise.ACCEPT, ranks)  # (B, D+1, C)
    node = torch.zeros_like(base)
    walking = torch.ones_like(base, dtype=torch.bool)
    target = scores[:, 0].softmax(-1)  # (B, V): the target's distribution at the node after the rejections so far
    for level in range(tree.max_depth):
        assert proposal.draft_logits is not None, "check() refuses a tree of several nodes without"
        draft_logits = proposal.draft_logits[rows, node]  # (B, V): -inf where a child was rejected
        children = (tree.parents == node[:, None]) & walking[:, None] & (proposal.tokens >= 0)  # (B, N)
        walking = torch.zeros_like(walking)
        for rank in range(tree.max_children):
            offered = children & (tree.ranks == rank) & ~walking[:, None]
            child = (offered * index).sum(-1)  # at most one; not argmax over int8, which inductor can compile wrongly
            token = proposal.tokens.gather(1, child[:, None]).clamp(min=0)  # (B, 1)
            draft = draft_logits.softmax(-1)
            odds = coins[:, level, rank, None] * draft.gather(1, token) < target.gather(1, token)
            present = offered.any(-1)
            accept = present & odds[:, 0]
            reject = (present & ~odds[:, 0])[:, None]
            target = torch.where(reject, _left_over(target, draft), target)
            draft_logits = torch.where(reject, draft_logits.scatter(1, token, -torch.inf), draft_logits)
            node = torch.where(accept, child, node)
            walking = walking | accept
        target = torch.where(walking[:, None], scores[rows, node].softmax(-1), target)
    depth = tree.depths.expand(len(base), -1).gather(1, node[:, None])  # (B, 1)
    vocab = torch.arange(scores.shape[-1], device=scores.device)
    bonus_noise = noise.gumbel(keys, positions.gather(1, depth), noise.BONUS, vocab)[:, 0]
    best, bonus = (target.log() + bonus_noise).max(-1)
    return Verdict.at(node, bonus, best, proposal)


def _left_over(target: Tensor, draft: Tensor) -> Tensor:
    """norm(max(target - draft, 0)), (B, V); the target itself where rounding leaves nothing."""
    left = (target - draft).clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / mass, target)


RULES = {
    "match": Rule(_match, lossless=True, same_text=True, coupling="shared"),
    "residual": Rule(_residual, lossless=True, same_text=False, coupling="own"),
    "typical": Rule(_typical, lossless=False, same_text=False, coupling="own"),
}
