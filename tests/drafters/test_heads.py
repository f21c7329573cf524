"""Medusa heads as drafters: proposals against path-by-path evaluation, text and law in whole decoding."""

import copy
import itertools

import paceline
import pytest
import torch
from paceline.drafters.head_settings import HeadSettings
from paceline.drafters.medusa import MedusaDrafter, MedusaHeads
from paceline.spec import noise
from paceline.spec.kernels.cpu import is_x86
from paceline.spec.kernels.linears import Packing
from paceline.spec.proposal import DraftSampling
from paceline.spec.tree import TreeShape

from support.families import SUPPORTED, build
from support.heads import TEMPERATURES, open_session
from support.models import fitted_heads, tiny_llama
from support.reference import two_token_law

MODES = ["independent", "markov", "hydra"]
KNOWN = [None, 40]


@pytest.fixture(scope="module")
def heads(target):
    """Trained heads of each kind: (mode, known tokens or None) -> heads."""
    made = {(mode, known): fitted_heads(target, mode, known=known) for mode in MODES for known in KNOWN}
    made["own", None] = fitted_heads(target, "hydra", own_heads=True, blocks=2)
    return made


def slow_logits(heads, hidden, path):
    """Head number len(path) below the nodes `path`, root first, by the papers' formulas; float64, one vector."""
    k = len(path) - 1
    x = hidden.double()
    for block in range(heads.settings.blocks):
        inner = heads.weight[block, k].double() @ x + heads.bias[block, k].double()
        if heads.settings.mode == "hydra" and block == 0:
            for distance, token in enumerate(reversed(path)):
                embedding = heads.embeddings[token].double()
                embedding = embedding / embedding.square().mean().sqrt()
                inner = inner + heads.path_weight[distance].double().T @ embedding
        x = x + inner * torch.sigmoid(inner)
    weight = heads.head_weight[k] if heads.settings.own_heads else heads.head_weight
    logits = weight.double() @ x + heads.head_bias.double()
    if heads.settings.mode == "markov":
        known = heads.vocabulary.tolist()
        row = known.index(path[-1]) if path[-1] in known else len(known)
        logits = logits + heads.previous[row].double() @ heads.following.double()
    return logits


def slow_children(heads, hidden, path, count, sampling, key, position):
    """The `count` best known tokens of the race below `path`, the best first."""
    scores = slow_logits(heads, hidden, path) / TEMPERATURES[sampling.coupling]
    if sampling.coupling != "none":
        stream = noise.TARGET if sampling.coupling == "shared" else noise.DRAFT
        scores = scores + noise.gumbel(key[None], torch.tensor([[position]]), stream, heads.vocabulary)[0, 0]
    return heads.vocabulary[scores.argsort(descending=True)[:count]].tolist()


SHAPES = ["chain:3", "4x2x1", (-1, 0, 0, 0, 1, 1, 3, 4, 4, 4, 6)]
SAMPLINGS = [DraftSampling(), DraftSampling("shared"), DraftSampling("own")]


@pytest.mark.parametrize("kind", [*itertools.product(MODES, KNOWN), ("own", None)], ids=str)
def test_proposals_equal_heads_evaluated_path_by_path(target, heads, kind):
    mine = heads[kind]
    for text, sampling in itertools.product(SHAPES, SAMPLINGS):
        shape = TreeShape.parse(text)
        session, state = open_session(target, mine, shape, sampling)
        proposal = session.propose(state)
        for row, tokens in enumerate(proposal.tokens.tolist()):
            assert tokens[0] == state.roots()[row]
            for node in (node for node, children in enumerate(shape.children) if children):
                path, children = [node], shape.children[node]
                while shape.parents[path[0]] >= 0:
                    path.insert(0, shape.parents[path[0]])
                path = [tokens[above] for above in path]
                position = int(state.lengths[row]) + shape.depths[node]
                key = state.keys[row]
                truth = slow_children(mine, session.hidden[row], path, len(children), sampling, key, position)
                assert [tokens[child] for child in children] == truth
                if sampling.coupling == "own":
                    law = proposal.draft_logits[row, node]
                    assert law.isfinite().nonzero()[:, 0].tolist() == mine.vocabulary.tolist()
                    slow = slow_logits(mine, session.hidden[row], path) / TEMPERATURES[sampling.coupling]
                    assert torch.allclose(law[mine.vocabulary].double(), slow, atol=1e-4)


def test_the_law_says_how_the_children_were_drawn(target, heads):
    said = []
    for sampling in SAMPLINGS:
        proposal = open_session(target, heads["hydra", 40], TreeShape.parse("2x2"), sampling)
        proposal = proposal[0].propose(proposal[1])
        said.append((proposal.law, proposal.coupling, proposal.draft_logits is not None))
    assert said == [
        ("deterministic", "own", False),
        ("without_replacement", "shared", False),
        ("without_replacement", "own", True),
    ]


def test_nodes_deeper_than_there_are_heads_stay_empty(target, heads, ragged):
    session, state = open_session(target, heads["markov", None], TreeShape.chain(5), SAMPLINGS[0])
    tokens = session.propose(state).tokens
    assert (tokens[:, :4] >= 0).all() and (tokens[:, 4:] == -1).all()
    truth = target.generate(ragged[0], attention_mask=ragged[1], do_sample=False, max_new_tokens=12)
    for rule in ("match", "residual"):
        options = dict(drafter=MedusaDrafter(heads["markov", None]), tree="chain:5", verify=rule, max_new_tokens=12)
        assert torch.equal(paceline.generate(target, *ragged, do_sample=False, **options), truth)
        paceline.generate(target, *ragged, do_sample=True, **options)


@pytest.mark.parametrize("kind", [*itertools.product(MODES, KNOWN), ("own", None)], ids=str)
def test_texts_are_the_targets_own_and_drafts_are_accepted(target, heads, ragged, kind):
    drafter = MedusaDrafter(heads[kind])
    for sampling in (dict(do_sample=False), dict(do_sample=True, top_k=0), dict(do_sample=True, temperature=0.6)):
        options = dict(seed=5, max_new_tokens=24, **sampling)
        truth = paceline.generate(target, *ragged, **options)
        for tree in (None, "chain:3", "3x2x1"):
            out = paceline.generate(
                target, *ragged, drafter=drafter, tree=tree, return_dict_in_generate=True, **options
            )
            assert torch.equal(out.sequences, truth), (sampling, tree)
            assert out.trace.summary()["tokens_per_step"] > 1


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma2", "cohere", "opt", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_untrained_heads_are_the_lm_head_and_decode_losslessly(name, mode):
    """Also under tied and biased LM heads, and where the target caps or scales its logits afterwards."""
    model = build(name, SUPPORTED[name])
    made = MedusaHeads.make(HeadSettings(mode, heads=2), model).to(model.dtype)
    hidden = torch.randn(4, made.hidden_size)
    with torch.no_grad():
        for depth in range(2):
            path = torch.randint(0, 64, (4, depth + 1))
            logits = made.follow(made.start(hidden), depth, path)
            assert torch.allclose(logits, model.get_output_embeddings()(hidden), atol=1e-5)
    ids = torch.randint(3, 64, (2, 6))
    options = dict(max_new_tokens=10, eos_token_id=None, pad_token_id=0, seed=0)
    for sampling in (dict(do_sample=False), dict(do_sample=True, top_k=0)):
        truth = paceline.generate(model, ids, **options, **sampling)
        assert torch.equal(paceline.generate(model, ids, drafter=MedusaDrafter(made), **options, **sampling), truth)


@torch.no_grad()
def test_what_is_the_targets_is_shared_and_not_stored(target):
    whole = MedusaHeads.make(HeadSettings("hydra"), target)
    assert whole.head_weight.data_ptr() == target.lm_head.weight.data_ptr()
    assert whole.embeddings.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    assert set(whole.state_dict()) == {"weight", "bias", "path_weight"}
    trimmed = MedusaHeads.make(HeadSettings(), target, torch.tensor([3, 9, 60]))
    assert torch.equal(trimmed.head_weight, target.lm_head.weight[[3, 9, 60]])
    assert set(trimmed.state_dict()) == {"weight", "bias", "vocabulary"}
    assert set(MedusaHeads.make(HeadSettings(), target, torch.arange(61)).state_dict()) == {"weight", "bias"}


@pytest.mark.skipif(not is_x86(), reason="not an x86 CPU")
@torch.no_grad()
def test_the_lm_head_of_heads_can_be_packed(heads):
    """As a layer on the same memory, which follows the heads; what is read of it is the packed copy."""
    own, hidden, path = copy.deepcopy(heads["hydra", 40]), torch.randn(2, 32), torch.tensor([[5], [9]])
    before = own.follow(own.start(hidden), 0, path)
    (layer,) = own.linears()
    assert layer.weight.data_ptr() == own.head_weight.data_ptr() and own.linears() == [layer]
    packing = Packing([layer])
    own.head_weight.mul_(2)
    with packing:
        torch.testing.assert_close(own.follow(own.start(hidden), 0, path), before)
    assert not torch.allclose(own.follow(own.start(hidden), 0, path), before), "outside, the weights are"
    (other,) = own.double().linears()
    assert other is not layer and other.weight.dtype == torch.float64
    assert heads["own", None].linears() == []


@pytest.mark.parametrize("rule", ["match", "residual"])
def test_decoding_with_trimmed_heads_has_the_targets_law(rule):
    """Four thousand rows of one prompt: the joint law of the first two tokens, whole decoder included. Heads
    that know three of four tokens; chance alone gives a total variation of about 0.025."""
    model = tiny_llama(vocab=4, seed=1, bos_token_id=None)
    drafter = MedusaDrafter(fitted_heads(model, "hydra", known=3, steps=20))
    distance, accepted = two_token_law(model, drafter, rule)
    assert distance < 0.045 and 0.1 < accepted < 0.95


def test_what_heads_cannot_do_is_refused_in_a_sentence(target, heads, ragged):
    drafter = MedusaDrafter(heads["independent", 40])
    for tree, words in (("dynamic:8x2x3", "fixed trees only"), ("41", "41 children and the vocabulary 40")):
        with pytest.raises(ValueError, match=words):
            paceline.generate(target, *ragged, drafter=drafter, tree=tree, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"hidden states of 32 numbers in torch.float32 .* load it for this target"):
        paceline.generate(tiny_llama().double(), *ragged, drafter=drafter, max_new_tokens=4)
    for settings, words in (
        (dict(mode="eagle"), "independent, markov, hydra"),
        (dict(heads=0), "heads=0 must be a whole number"),
        (dict(blocks=True), "blocks=True must be"),
    ):
        with pytest.raises(ValueError, match=words):
            HeadSettings(**settings)
    for ids in ([3, 3], [5, 4], [0, 61], [-1, 4], [], [0.5, 1.0]):
        with pytest.raises(ValueError, match="ascending token ids from 0 to 60"):
            MedusaHeads.make(HeadSettings(), target, torch.tensor(ids))


def test_heads_can_be_calibrated_and_planned_for(target, heads):
    """With the planner's deep wide tree, whose nodes below the last head stay empty and count for nothing."""
    from paceline.spec.plan.calibration import calibrate
    from paceline.spec.plan.store import plan_path
    from paceline.spec.plan.trees import Acceptance

    drafter = MedusaDrafter(heads["hydra", None])
    prompts = [{"input_ids": torch.randint(1, 61, (1, 5))} for _ in range(3)]
    replay = calibrate(target, drafter, prompts, "match", temperature=0.0, new_tokens=20)
    hits = Acceptance.of(replay.walk(TreeShape.chain(0))).hits
    assert sum(hits[0]) > 0 and not any(map(sum, hits[3:]))
    same = plan_path(target, MedusaDrafter(heads["hydra", None]), "eager", "match", 0.0)
    assert plan_path(target, drafter, "eager", "match", 0.0) == same
    assert plan_path(target, MedusaDrafter(heads["hydra", 40], drafter.name), "eager", "match", 0.0) != same
