"""Pairs of drafter and rule, and the call that decodes by them."""

import itertools

import paceline

WAYS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=12, suppress_tokens=[3, 4]),
}
DRAFTERS = ["none", "ngram", "model", "independent", "markov", "hydra", "beside"]
PAIRS = [
    *(pair for pair in itertools.product(DRAFTERS, ["match", "residual", "typical"], WAYS)
      if pair != ("ngram", "residual", "sampled")),
    ("eagle", "match", "greedy"), ("eagle", "residual", "sampled"), ("eagle beside", "match", "sampled"),
]  # fmt: skip


def decode(model, drafter, rule, way, batch, executor, seed=0):
    options = dict(max_new_tokens=20, eos_token_id=[17, 30], pad_token_id=0, verify=rule, seed=seed)
    return paceline.generate(model, *batch, drafter=drafter, executor=executor, **options, **WAYS[way])
