"""Sampled text is the seed's own, whatever drafter and batch it came from, and has the target's law."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.noise import row_keys
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from support.models import noisy_copy, tiny_llama
from support.processors import Upwards
from support.reference import plain_text, two_token_law

NEW = 24

SAMPLING = {
    "temperature": dict(temperature=0.7, top_k=0),
    "top-k": dict(top_k=5),
    "top-p": dict(top_p=0.8, temperature=1.3, top_k=0),
    "min-p": dict(min_p=0.1, top_k=0),
    "typical": dict(typical_p=0.7, top_k=0),
    "epsilon": dict(epsilon_cutoff=0.02, top_k=0),
    "eta": dict(eta_cutoff=0.05, top_k=0),
    "top-h": dict(top_h=0.6, top_k=0),
    "history": dict(repetition_penalty=1.5, top_p=0.9, no_repeat_ngram_size=3),
    "user processor": dict(logits_processor=LogitsProcessorList([Upwards()]), top_k=8),
    "copies": dict(num_return_sequences=2, top_k=0, repetition_penalty=1.2),
    "ends": dict(top_k=0, eos_token_id=[17, 5, 30, 31, 32], pad_token_id=0),
}
QUICK = ("temperature", "top-p", "history")  # what the default run takes of these


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in SAMPLING]
)
def test_sampled_text_is_the_seed_s_whatever_the_drafter(target, draft, hydra, ragged, case):
    ids, mask = ragged
    options = dict(do_sample=True, max_new_tokens=NEW) | SAMPLING[case]
    for seed in (0, 5):
        truth = paceline.generate(target, ids, mask, seed=seed, **options)
        for drafter, tree in (
            ("ngram", None),
            (draft, "chain:4"),
            (draft, "4x2x1"),
            (draft, [-1, 0, 0, 1, 3]),
            (hydra, "4x2x1"),
        ):
            got = paceline.generate(target, ids, mask, drafter=drafter, tree=tree, seed=seed, **options)
            assert torch.equal(got, truth), (drafter, tree)


def test_plain_decoding_equals_the_slow_reference(target, ragged):
    """`drafter=None` against cache-less decoding of each row alone, greedy and sampled."""
    ids, mask = ragged
    greedy = paceline.generate(target, ids, mask, do_sample=False, max_new_tokens=NEW)
    sampled = paceline.generate(
        target, ids, mask, seed=9, do_sample=True, max_new_tokens=NEW, temperature=0.8, top_p=0.9, top_k=0
    )
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]
    keys = row_keys(9, 3, "cpu")
    for row in range(3):
        prompt = ids[row][mask[row] == 1].tolist()
        assert greedy[row, 9:].tolist() == plain_text(target, prompt, NEW)
        assert sampled[row, 9:].tolist() == plain_text(target, prompt, NEW, warpers, keys[row])


def test_a_row_does_not_know_its_batch(target, draft, ragged):
    """The same text alone, with other mates, and with the other rows in another order."""
    ids, mask = ragged
    options = dict(do_sample=True, max_new_tokens=NEW, top_k=0, drafter=draft, tree="3x2")
    together = paceline.generate(target, ids, mask, seed=[11, 12, 13], **options)
    order = [2, 0, 1]
    shuffled = paceline.generate(target, ids[order], mask[order], seed=[13, 11, 12], **options)
    assert torch.equal(together[order], shuffled)
    for row, seed in enumerate((11, 12, 13)):
        keep = mask[row] == 1
        alone = paceline.generate(target, ids[row : row + 1, keep], seed=seed, **options)
        assert torch.equal(alone[0, keep.sum() :], together[row, 9:])
    first = paceline.generate(target, ids, mask, seed=11, **options)
    assert torch.equal(first[0], together[0]), "row r of an integer seed is stream (seed, r)"
    assert not torch.equal(first[1], together[1])


def test_residual_and_typical_decode_and_agree_at_temperature_zero(target, draft, ragged):
    ids, mask = ragged
    truth = target.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for rule in ("residual", "typical"):
        got = paceline.generate(
            target, ids, mask, drafter=draft, tree="3x2", verify=rule, do_sample=False, max_new_tokens=NEW
        )
        assert torch.equal(got, truth)
        texts = [
            paceline.generate(
                target,
                ids,
                mask,
                drafter=draft,
                tree="3x2",
                verify=rule,
                seed=1,
                do_sample=True,
                max_new_tokens=NEW,
            )
            for _ in range(2)
        ]
        assert torch.equal(*texts), "reproducible"


@pytest.mark.parametrize("rule", ["match", "residual"])
def test_decoding_with_a_draft_model_has_the_targets_law(rule):
    """Four thousand rows of one prompt: the joint law of the first two tokens, whole decoder included.

    Chance alone gives a total variation of about 0.025 here; drafts verified as if they were the target's
    would give several times as much."""
    model = tiny_llama(vocab=4, seed=1, bos_token_id=None)
    drafter = ModelDrafter(noisy_copy(model, noise=0.3))
    prompt = torch.tensor([[2, 3, 1]])
    with torch.no_grad():
        first, other = (m(prompt).logits[0, -1].softmax(-1) for m in (model, drafter.model))
    assert (first - other).abs().sum() / 2 > 0.1, "the draft is another law"
    distance, accepted = two_token_law(model, drafter, rule)
    assert distance < 0.045 and 0.1 < accepted < 0.9
