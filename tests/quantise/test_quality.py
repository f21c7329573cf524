"""The measures of a quantised model, against what they are by definition and by decoding."""

import math

import torch
from paceline import generate
from paceline.spec.quantise.quality import HeldOut, compare, logits_on

from support.blocks import some_texts


def held_out():
    return [HeldOut(text[: 20 + number], 5 + number) for number, text in enumerate(some_texts(count=3))]


def test_a_model_is_itself(original):
    logits = logits_on(original, held_out())
    quality = compare(logits, logits, held_out())
    assert (quality.positions, quality.kl, quality.greedy, quality.coupled) == (45, 0.0, 1.0, 1.0)


@torch.no_grad()
def test_divergence_agreement_and_perplexity_are_means_over_positions(original, quantised):
    divergence, same, surprise = [], [], []
    for text in held_out():
        ids = torch.tensor([text.tokens])
        theirs, mine = (model(ids).logits[0].double().softmax(-1) for model in (original, quantised))
        for place in range(text.begin, len(text.tokens)):
            p, q = theirs[place - 1], mine[place - 1]
            divergence.append(float((p * (p / q).log()).sum()))
            same.append(int(p.argmax()) == int(q.argmax()))
            surprise.append(-math.log(q[text.tokens[place]]))
    made = compare(logits_on(original, held_out()), logits_on(quantised, held_out()), held_out())
    assert math.isclose(made.kl, sum(divergence) / 45, rel_tol=1e-4) and made.kl > 0
    assert math.isclose(made.perplexity, math.exp(sum(surprise) / 45), rel_tol=1e-4)
    assert made.greedy == sum(same) / 45


@torch.no_grad()
def test_tokens_are_drawn_with_the_noise_of_decoding(original):
    """A text drawn with seed 0: the model's own draws are what the measure compares with."""
    ids = torch.tensor([[3, 4, 5, 6]])
    text = generate(original, ids, do_sample=True, top_k=0, seed=0, max_new_tokens=20)[0].tolist()
    own = HeldOut(text, 4)
    logits = logits_on(original, [own])
    drawn = [torch.full_like(logits[0], -30.0).scatter(1, torch.tensor(text[4:])[:, None], 30.0)]
    assert compare(logits, drawn, [own]).coupled == 1.0
    assert compare(logits, [drawn[0].roll(1, 1)], [own]).coupled < 0.2
