"""The walk, which asks for the scores of one node after another: the verdict of `match` on all of them at once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paceline.spec import noise
from paceline.spec.proposal import NO_TOKEN, Proposal
from paceline.spec.tree import TokenTree
from paceline.spec.verify import RULES, verify, walk, walks

from support.trees import shapes

ROWS, VOCAB = 5, 7


@st.composite
def cases(draw):
    """A filled tree of 5 rows, in which about half of the tokens are what is drawn above them: siblings are doubled,
    some nodes are empty, and the scores of some forbid everything or are NaN."""
    tree = TokenTree.of(draw(shapes(most=14)), "cpu")
    torch.manual_seed(draw(st.integers(0, 10_000)))
    language = 4 * torch.randn(VOCAB, VOCAB)  # [last token, next]: equal paths have equal scores
    language[torch.rand(VOCAB, VOCAB) < 0.2] = -torch.inf
    spoilt = draw(st.sampled_from([None, -torch.inf, torch.nan]))
    if spoilt is not None:
        language[3] = spoilt
    tokens = torch.zeros(ROWS, tree.size, dtype=torch.long)
    for node in range(1, tree.size):
        likely = language[tokens[:, tree.parents[0, node]]].argmax(-1)
        tokens[:, node] = torch.where(torch.rand(ROWS) < 0.5, torch.randint(NO_TOKEN, VOCAB, (ROWS,)), likely)
    keys, base = noise.row_keys(1, ROWS, "cpu"), torch.randint(0, 50, (ROWS,))
    return Proposal(tokens, tree, "deterministic", "own"), language[tokens.clamp(min=0)], keys, base


@settings(max_examples=40)
@given(cases(), st.booleans(), st.integers(0, 2**ROWS - 1))
def test_the_walk_is_match(case, sampling, mask):
    proposal, scores, keys, base = case
    live = torch.tensor([bool(mask >> row & 1) for row in range(ROWS)])
    asked = []

    def scores_at(node, going):
        asked.append((node, going))
        return scores[torch.arange(ROWS), node]

    truth = verify("match", scores, proposal, keys, base, sampling)
    got = walk(scores_at, proposal, keys, base, live, sampling)
    for name in ("accepted", "path", "tokens", "bonus", "failed"):
        assert torch.equal(getattr(got, name)[live], getattr(truth, name)[live]), name
    for row in live.nonzero()[:, 0].tolist():
        looked_at = [int(node[row]) for node, going in asked if going[row]]
        path = truth.path[row, : truth.accepted[row] + 1]
        assert torch.equal(proposal.tokens[row, looked_at], proposal.tokens[row, path]), "or siblings of equal tokens"
    assert len(asked) == max([1, *(truth.accepted[live] + 1).tolist()]), "no more nodes than the longest path has"


def test_a_token_that_nothing_allows_is_not_accepted():
    """Of scores that are all -inf the argmax is 0, which may be what was drafted."""
    tree = TokenTree.from_parents(torch.tensor([[-1, 0, 1]]), 2, 1)
    proposal = Proposal(torch.tensor([[4, 2, 0]]), tree, "deterministic", "own")
    scores = torch.zeros(1, 3, VOCAB)
    scores[0, 0, 2], scores[0, 1] = 1, -torch.inf
    keys, base = noise.row_keys(1, 1, "cpu"), torch.tensor([5])
    for sampling in (False, True):
        scores[0, 0, 2] = 100
        for got in (
            verify("match", scores, proposal, keys, base, sampling),
            walk(lambda node, going: scores[:, int(node)], proposal, keys, base, torch.tensor([True]), sampling),
        ):
            assert got.accepted == 1 and got.failed


def test_which_rules_walk():
    assert [name for name in RULES if walks(name, True)] == ["match"]
    assert all(walks(name, False) for name in RULES)
