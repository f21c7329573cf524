"""The verification rules: equal to the slow reference, exact in law, and planted errors do not pass.

The law tests decode two tokens of a toy language 200,000 times, every row with a noise stream of its
own, and compare the joint law with the target's: a right rule stays below 0.008 of total variation
(36 outcomes of 200,000 draws scatter by about 0.004), a wrong one does not.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paceline.spec import noise
from paceline.spec.proposal import NO_TOKEN, DraftSampling, Proposal
from paceline.spec.tree import TokenTree, TreeShape
from paceline.spec.verify import check, verify

from support.reference import plain_draw, walk_match, walk_residual, walk_typical
from support.trees import shapes

VOCAB, DRAWS, BOUND = 6, 200_000, 0.008


def random_case(shape, seed, rows=5, vocab=7):
    torch.manual_seed(seed)
    tree = TokenTree.of(shape, "cpu")
    scores = 2 * torch.randn(rows, tree.size, vocab)
    draft_logits = scores + torch.randn_like(scores)
    keys, base = noise.row_keys(seed, rows, "cpu"), torch.randint(0, 50, (rows,))
    return tree, scores, draft_logits, keys, base


def drawn(tree, draft_logits, keys, base, how="own", start=0):
    """Fill a tree level by level as a drafter does, from given logits of each node."""
    sampling = DraftSampling(coupling=how)
    tokens = torch.full((len(base), tree.size), start)
    vocab = torch.arange(draft_logits.shape[-1])
    for node in range(tree.size):
        children = [n for n in range(tree.size) if tree.parents[0, n] == node]
        if children:
            position = base[:, None] + 1 + tree.depths[0, node]
            race = draft_logits[:, node] + sampling.gumbel(keys, position, vocab)[:, 0]
            tokens[:, children] = race.topk(len(children)).indices
    return tokens


@given(shapes(most=9), st.integers(0, 10_000), st.booleans())
def test_match_equals_the_reference(shape, seed, sampling):
    tree, _, _, keys, base = random_case(shape, seed)
    language = 2 * torch.randn(7, 7)  # [last token, next]: duplicate siblings have the same scores
    tokens = torch.zeros(5, tree.size, dtype=torch.long)
    for node in range(1, tree.size):
        likely = language[tokens[:, shape.parents[node]]].argmax(-1)
        other = torch.randint(NO_TOKEN, 7, (5,))
        tokens[:, node] = torch.where(torch.rand(5) < 0.3, other, likely)
    scores = language[tokens]
    got = verify("match", scores, Proposal(tokens, tree, "deterministic", "own"), keys, base, sampling)
    for row in range(5):
        depths = shape.depths
        draws = [
            plain_draw(scores[row, n], keys[row], int(base[row]) + 1 + depths[n])
            if sampling
            else int(scores[row, n].argmax())
            for n in range(tree.size)
        ]
        path = walk_match(shape.parents, tokens[row].tolist(), draws)
        assert got.accepted[row] == len(path) - 1
        assert got.bonus[row] == draws[path[-1]]
        committed = [*tokens[row, path[1:]].tolist(), draws[path[-1]]]
        assert got.tokens[row, : len(path)].tolist() == committed


@given(shapes(most=8).filter(lambda shape: shape.max_children <= 5), st.integers(0, 10_000))
def test_residual_equals_the_reference(shape, seed):
    tree, scores, draft_logits, keys, base = random_case(shape, seed)
    tokens = drawn(tree, draft_logits, keys, base)
    proposal = Proposal(tokens, tree, "without_replacement", "own", draft_logits)
    got = verify("residual", scores, proposal, keys, base, True)
    ranks = torch.arange(max(tree.max_children, 1))
    positions = base[:, None] + 1 + torch.arange(tree.max_depth + 1)
    coins = noise.uniform(keys, positions, noise.ACCEPT, ranks).double().tolist()
    for row in range(5):
        target = scores[row].double().softmax(-1).tolist()
        draft = draft_logits[row].double().softmax(-1).tolist()
        path, law = walk_residual(shape.parents, tokens[row].tolist(), target, draft, coins[row])
        assert got.path[row, : len(path)].tolist() == path and got.accepted[row] == len(path) - 1
        log_law = torch.tensor(law).log()
        assert got.bonus[row] == plain_draw(log_law, keys[row], int(positions[row, len(path) - 1]), noise.BONUS)


@given(shapes(most=8), st.integers(0, 10_000))
def test_typical_equals_the_reference(shape, seed):
    tree, scores, _, keys, base = random_case(shape, seed)
    tokens = torch.randint(NO_TOKEN, 7, (5, tree.size))
    got = verify("typical", scores, Proposal(tokens, tree, "deterministic", "own"), keys, base, True)
    for row in range(5):
        path = walk_typical(shape.parents, tokens[row].tolist(), scores[row].double().softmax(-1).tolist())
        assert got.accepted[row] == len(path) - 1
        assert tokens[row, got.path[row, 1 : len(path)]].tolist() == tokens[row, path[1:]].tolist()
        position = int(base[row]) + len(path)
        assert got.bonus[row] == plain_draw(scores[row, path[-1]], keys[row], position)


class Toy:
    """A language whose next-token law depends on the last token; the draft's is another one."""

    def __init__(self, noise_scale=1.5):
        torch.manual_seed(11)
        self.target = 1.5 * torch.randn(VOCAB, VOCAB)  # [last token, next token]
        self.draft = self.target + noise_scale * torch.randn(VOCAB, VOCAB)
        self.keys = torch.randint(0, 2**32, (DRAWS, 2))
        self.base = torch.full((DRAWS,), 3)

    def joint(self):
        first = self.target[0].softmax(-1)
        return first[:, None] * self.target.softmax(-1)

    def propose(self, shape, how="own", pick=None):
        """Draw a tree; `pick(race, logits, k)` chooses children from the race, top-k if not given."""
        tree = TokenTree.of(shape, "cpu")
        sampling = DraftSampling(coupling=how)
        tokens = torch.zeros(DRAWS, tree.size, dtype=torch.long)
        for node, children in enumerate(shape.children):
            if children:
                position = (self.base + 1 + shape.depths[node])[:, None]
                logits = self.draft[tokens[:, node]]
                race = logits + sampling.gumbel(self.keys, position, torch.arange(VOCAB))[:, 0]
                chosen = race.topk(len(children)).indices if pick is None else pick(race, logits, len(children))
                tokens[:, list(children)] = chosen
        return tokens, tree, self.draft[tokens]

    def error(self, tokens, tree, verdict):
        """Total variation between the first two tokens of the text and the target's law."""
        first = verdict.tokens[:, 0]
        second = torch.where(verdict.accepted > 0, verdict.tokens[:, min(1, tree.max_depth)], 0)
        vocab = torch.arange(VOCAB)
        plain = noise.gumbel(self.keys, self.base[:, None] + 2, noise.BONUS, vocab)[:, 0] + self.target[first]
        second = torch.where(verdict.accepted > 0, second, plain.argmax(-1))
        counts = (first * VOCAB + second).bincount(minlength=VOCAB**2).double() / DRAWS
        return float((counts - self.joint().flatten()).abs().sum() / 2)

    def verify(self, rule, tokens, tree, draft_logits, law="without_replacement", how="own"):
        proposal = Proposal(tokens, tree, law, how, draft_logits)
        return verify(rule, self.target[tokens], proposal, self.keys, self.base, True)


SHAPES = {"chain": TreeShape.chain(2), "tree": TreeShape.parse("3x2"), "wide": TreeShape.parse("6")}


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_residual_is_exact_in_law(toy, shape):
    tokens, tree, draft_logits = toy.propose(shape)
    assert toy.error(tokens, tree, toy.verify("residual", tokens, tree, draft_logits)) < BOUND


def test_residual_accepts_a_chain_as_often_as_the_theory_says(toy):
    tokens, tree, draft_logits = toy.propose(TreeShape.chain(1))
    rate = toy.verify("residual", tokens, tree, draft_logits).accepted.double().mean()
    overlap = torch.minimum(toy.target[0].softmax(-1), toy.draft[0].softmax(-1)).sum()
    assert abs(rate - overlap) < 0.005


@pytest.mark.parametrize("how", ["own", "shared"])
def test_match_is_exact_in_law_and_coupling_pays(toy, how):
    tokens, tree, draft_logits = toy.propose(SHAPES["tree"], how)
    verdict = toy.verify("match", tokens, tree, draft_logits, how=how)
    assert toy.error(tokens, tree, verdict) < BOUND
    apart = toy.verify("match", *toy.propose(SHAPES["tree"], "own"), how="own").accepted.double().mean()
    if how == "shared":
        assert verdict.accepted.double().mean() > apart + 0.1


def test_match_ignores_how_the_draft_came_about(toy):
    tokens, tree, _ = toy.propose(SHAPES["chain"])
    mine = toy.verify("match", tokens, tree, None)
    plain = toy.verify("match", tokens[:, :1], TokenTree.of(TreeShape.chain(0), "cpu"), None)
    assert torch.equal(mine.tokens[:, 0], plain.tokens[:, 0]), "the text of a seed is the text of a seed"


def planted_soft_q(toy):
    """Top-k children, deterministic, but verified with the draft's soft probabilities."""
    tokens, tree, logits = toy.propose(SHAPES["tree"], pick=lambda race, logits, k: logits.topk(k).indices)
    return tokens, tree, toy.verify("residual", tokens, tree, logits)


def planted_pruning(toy):
    """Three children drawn without replacement, then only the likeliest two kept."""

    def pick(race, logits, k):
        sampled = race.topk(3).indices
        return sampled.gather(1, logits.gather(1, sampled).topk(2).indices)

    tokens, tree, logits = toy.propose(TreeShape.parse("2"), pick=pick)
    return tokens, tree, toy.verify("residual", tokens, tree, logits)


def planted_shared_noise(toy):
    """Drafts drawn with the target's noise, sent to `residual` as the drafter's own: the noise that
    chose the children is the one that draws what follows a rejection."""
    tokens, tree, logits = Toy(noise_scale=4.0).propose(SHAPES["tree"], how="shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "BONUS", noise.TARGET)
        return tokens, tree, toy.verify("residual", tokens, tree, logits)


def planted_replacement(toy):
    """Siblings drawn with replacement, verified as if without."""

    def pick(race, logits, k):
        torch.manual_seed(5)
        return torch.multinomial(logits.softmax(-1), k, replacement=True)

    tokens, tree, logits = toy.propose(SHAPES["tree"], pick=pick)
    return tokens, tree, toy.verify("residual", tokens, tree, logits)


def planted_wrong_temperature(toy):
    """Children drawn at temperature 2, probabilities handed over at temperature 1."""
    hot = Toy()
    hot.draft = toy.draft / 2
    tokens, tree, _ = hot.propose(SHAPES["tree"])
    return tokens, tree, toy.verify("residual", tokens, tree, toy.draft[tokens])


def planted_coin_is_the_draft(toy):
    """The acceptance coin comes from the noise that drew the child."""
    tokens, tree, logits = toy.propose(SHAPES["tree"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "ACCEPT", noise.DRAFT)
        return tokens, tree, toy.verify("residual", tokens, tree, logits)


def planted_typical(toy):
    """Typical acceptance, which is not lossless and must be seen not to be."""
    tokens, tree, logits = toy.propose(SHAPES["tree"])
    return tokens, tree, toy.verify("typical", tokens, tree, logits)


@pytest.mark.parametrize(
    "planted",
    [
        planted_soft_q,
        planted_pruning,
        planted_shared_noise,
        planted_replacement,
        planted_wrong_temperature,
        planted_coin_is_the_draft,
        planted_typical,
    ],
)
def test_planted_errors_are_caught(toy, planted):
    assert toy.error(*planted(toy)) > 2 * BOUND


CHAIN, TREE = TokenTree.of(TreeShape.chain(2), "cpu"), TokenTree.of(TreeShape.parse("2"), "cpu")
ANY = torch.zeros(1, 3, VOCAB)


@pytest.mark.parametrize(
    ("proposal", "why"),
    [
        (Proposal(ANY[..., 0].long(), CHAIN, "deterministic", "own"), "without drawing"),
        (Proposal(ANY[..., 0].long(), CHAIN, "without_replacement", "shared", ANY), "not independent"),
        (Proposal(ANY[..., 0].long(), TREE, "iid", "own", ANY), "with replacement"),
        (Proposal(ANY[..., 0].long(), CHAIN, "iid", "own"), "no probabilities"),
    ],
)
def test_residual_refuses_what_it_would_bias(proposal, why):
    with pytest.raises(ValueError, match=why):
        check("residual", proposal, sampling=True)
    check("residual", proposal, sampling=False)  # greedy: every rule is an argmax
    check("match", proposal, sampling=True)


def test_residual_takes_an_iid_chain():
    check("residual", Proposal(ANY[..., 0].long(), CHAIN, "iid", "own", ANY), sampling=True)


def test_hopeless_scores_are_flagged():
    tree = TokenTree.of(TreeShape.chain(1), "cpu")
    scores = torch.zeros(3, 2, VOCAB)
    scores[0, 0, 2] = torch.nan
    scores[1, 0] = -torch.inf
    keys = noise.row_keys(0, 3, "cpu")
    for rule in ("match", "typical"):
        proposal = Proposal(torch.full((3, 2), NO_TOKEN), tree, "deterministic", "own")
        got = verify(rule, scores, proposal, keys, torch.tensor([0, 0, 0]), True)
        assert got.failed.tolist() == [True, True, False], rule
