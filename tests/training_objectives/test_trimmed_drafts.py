"""Draft models that know some tokens only: they learn and draft what they know, and lose nothing."""

import paceline
import pytest
import torch
from paceline.drafters.complete import complete
from paceline.spec import step as step_module
from paceline.training.objectives.draft_lm import DraftObjective, Known, next_tokens
from paceline.training.objectives.target import OnlineTarget, ScaledHead
from paceline.training.ranks import judge_of
from safetensors.torch import save_file

from support.draft_lms import SIZES, build

KNOWN = {"sizes": SIZES | {"hidden_size": 16}, "embeddings": "target", "head": "target", "known_tokens": 12}


@pytest.fixture
def trimmed(model, batch):
    """A draft that knows 12 tokens, trained until it is right now and then, and the rows that say which."""
    hidden = model.config.hidden_size
    settings = {**KNOWN, "sizes": {**SIZES, "hidden_size": hidden}, "save": {"without_target_weights": True}}
    rows = [{name: batch[name][row] for name in ("input_ids", "loss_mask")} for row in range(len(batch["input_ids"]))]
    objective = DraftObjective.build({"kind": "draft_lm", **settings}, model, rows)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 0.02)
    for _ in range(15):
        losses = objective(batch, None)
        (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.eval()


def test_a_trimmed_draft_learns_and_ranks_what_it_knows(model, batch, trimmed):
    """Loss and ranks against the whole logits of the same network, cut to the known ids by hand."""
    labels, counted = next_tokens(batch)
    own, ids = labels[counted], trimmed.known.ids
    assert len(ids) == 12
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        logits = trimmed.model(**inputs).logits[:, :-1][counted][:, ids]  # (N, 12)
        theirs = model(**inputs).logits[:, :-1][counted][:, ids].log_softmax(-1)
        losses = trimmed(batch, None)
        ranks = trimmed.label_ranks(batch, None)[:, 0]
    known = (own[:, None] == ids).any(1)
    assert 0 < known.sum() < len(own), "some labels are known and some are not"
    place = (own[known][:, None] == ids).long().argmax(1)
    wanted = -logits[known].log_softmax(-1).gather(1, place[:, None]).sum()
    torch.testing.assert_close(losses.total, wanted)
    assert losses.counted == known.sum() and losses.tried[0] == len(own)
    assert losses.hits[0] == (logits[known].argmax(1) == place).sum()
    better = (logits[known] > logits[known].gather(1, place[:, None])).sum(1)
    assert torch.equal(ranks[known], better) and (ranks[~known] == model.config.vocab_size).all()
    trimmed.losses = {"forward_kl": 1.0}
    seen = OnlineTarget(model).view(batch, "train", [0, 1, 2])
    q = logits[known].log_softmax(-1)
    divergence = (theirs[known].exp() * (theirs[known] - q)).sum()
    torch.testing.assert_close(trimmed(batch, seen).total.detach(), divergence)


@pytest.mark.parametrize("tree", ["3x2", "chain:3", "dynamic:9x3x3"])
def test_a_trimmed_draft_drafts_what_it_knows_and_loses_nothing(model, trimmed, tmp_path, tree):
    trimmed.save(tmp_path / "draft")
    drafter = paceline.load_drafter(tmp_path / "draft", model)
    ids = trimmed.known.ids
    assert torch.equal(drafter.vocabulary, ids) and drafter.model.get_output_embeddings().weight.shape[0] == 12
    prompt = torch.tensor([[5, 9, 11, 4]])
    options = {"max_new_tokens": 20, "do_sample": True, "seed": 3, "return_dict_in_generate": True}
    for sampled in (True, False):
        options["do_sample"] = sampled
        plain = paceline.generate(model, prompt, drafter=None, **options)
        out = paceline.generate(model, prompt, drafter=drafter, tree=tree, **options)
        assert torch.equal(out.sequences, plain.sequences)
        drafted = {token for event in out.trace.events for token in event.tokens[1:]}
        assert drafted <= set(ids.tolist())
    whole = complete(tmp_path / "draft", model)
    torch.testing.assert_close(whole(prompt).logits[..., ids], drafter.model(prompt).logits)
    wide = drafter.traits.causal_lm(prompt).logits  # for transformers' assisted generation
    torch.testing.assert_close(wide[..., ids], drafter.model(prompt).logits)
    assert wide.shape[-1] == model.config.vocab_size and wide.isfinite().sum() == 12 * prompt.shape[1]


def test_a_trimmed_draft_is_judged_as_it_was_trained(model, batch, trimmed, tmp_path):
    trimmed.save(tmp_path / "draft")
    ranks, judged = judge_of(paceline.load_drafter(tmp_path / "draft", model), model, 4)(batch)
    assert torch.equal(ranks, trimmed.label_ranks(batch, None)) and torch.equal(judged, next_tokens(batch)[1])


def test_a_trimmed_draft_hands_over_the_law_of_all_tokens(model, trimmed, tmp_path, monkeypatch):
    """Under `residual` tokens that the draft does not know are impossible, and its own law is over the others."""
    trimmed.save(tmp_path / "draft")
    drafter = paceline.load_drafter(tmp_path / "draft", model)
    proposals, real = [], step_module.verify
    monkeypatch.setattr(step_module, "verify", lambda rule, scores, proposal, *rest: proposals.append(proposal) or
                        real(rule, scores, proposal, *rest))  # fmt: skip
    prompt = torch.tensor([[5, 9, 11, 4]])
    options = dict(max_new_tokens=12, do_sample=True, seed=1, verify="residual")
    paceline.generate(model, prompt, drafter=drafter, tree="2x1", **options)
    law, ids = proposals[0].draft_logits[0, 0], trimmed.known.ids
    torch.testing.assert_close(law[ids], drafter.model(prompt).logits[0, -1])
    assert law.isfinite().sum() == len(ids)


def test_bad_known_tokens_are_named(model, trimmed, tmp_path):
    with pytest.raises(ValueError, match="known_tokens needs the target's LM head"):
        build(model, sizes=SIZES, known_tokens=5)
    trimmed.save(tmp_path / "draft")
    list_ = tmp_path / "draft" / "known_tokens.safetensors"
    ids = trimmed.known.ids
    for damage in (b"junk", ids[:-1].int(), ids.flip(0).int(), ids.float(), None):
        list_.unlink()
        if isinstance(damage, torch.Tensor):
            save_file({"ids": damage}, list_)
        elif damage:
            list_.write_bytes(damage)
        with pytest.raises(ValueError, match=r"known_tokens.safetensors is no list .* fetch the drafter again"):
            paceline.load_drafter(tmp_path / "draft", model)
        list_.write_bytes(b"")


def test_the_law_of_known_tokens_is_scaled_and_capped_as_the_targets(model):
    head, hidden = model.get_output_embeddings(), torch.randn(3, model.config.hidden_size)
    known = Known(model, torch.tensor([3, 5, 9]))
    scaled = ScaledHead(head, 0.25, 2.0)
    torch.testing.assert_close(known.law(scaled, hidden.dtype)(hidden), scaled(hidden)[:, known.ids])
