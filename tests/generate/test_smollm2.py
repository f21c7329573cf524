"""The promises on a real model: SmolLM2-135M-Instruct in float32, prompts of Spec-Bench (Apache-2.0).

The ordinary run takes the last 120 tokens of 3 prompts, 12 new tokens, one seed and half of the settings;
PACELINE_FULL=1 takes 300 of 24, 64, three and all.
"""

import json
import os
from functools import partial

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter

from support.models import noisy_copy

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]

FULL = bool(os.environ.get("PACELINE_FULL"))
PROMPTS, LONGEST, NEW, SEEDS = (24, 300, 64, (0, 1, 2)) if FULL else (3, 120, 12, (0,))
SETTINGS = {
    "ngram chain": ("ngram", "chain:5"),
    "ngram tree": ("ngram", "3x2x1x1"),
    "draft chain": ("draft", "chain:4"),
    "draft tree": ("draft", "3x2x1"),
}
if not FULL:
    SETTINGS = {name: SETTINGS[name] for name in ("ngram chain", "draft tree")}


@pytest.fixture(scope="module")
def prompts(smollm2, root):
    """Token ids of each prompt in the chat template, (1, P) each, of a long one the end."""
    lines = (root / "tests" / "spec_bench_24.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    texts = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    encode = partial(smollm2[1].apply_chat_template, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return [encode(text).input_ids[:, -LONGEST:] for text in texts]


@pytest.fixture(scope="module")
def drafters(smollm2):
    """Prompt lookup, and the model's own weights with some noise: a draft that is often but not always right."""
    return {"ngram": "ngram", "draft": ModelDrafter(noisy_copy(smollm2[0], noise=0.01))}


@pytest.fixture(scope="module")
def greedy(smollm2, prompts):
    return [new(smollm2[0].generate(ids, do_sample=False, max_new_tokens=NEW), ids) for ids in prompts]


def new(sequences, ids):
    """The generated tokens of a single row without padding behind the end of text."""
    tokens = sequences[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


def batches(prompts, size=4):
    """Left-padded batches: (first index, input_ids, mask)."""
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        width = max(ids.shape[1] for ids in group)
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=2) for row in group])
        pads = torch.tensor([width - row.shape[1] for row in group])
        yield start, ids, (torch.arange(width) >= pads[:, None]).long()


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_text_equals_transformers(smollm2, prompts, drafters, greedy, setting):
    model, name, tree = smollm2[0], *SETTINGS[setting]
    options = dict(drafter=drafters[name], tree=tree, do_sample=False, max_new_tokens=NEW)
    differing, accepted = 0, 0
    for ids, truth in zip(prompts, greedy):
        out = paceline.generate(model, ids, return_dict_in_generate=True, **options)
        differing += new(out.sequences, ids) != truth
        accepted += out.trace.summary()["num_accepted_draft_tokens"]
    for start, ids, mask in batches(prompts):
        sequences = paceline.generate(model, ids, mask, **options)
        for row in range(len(ids)):
            differing += new(sequences[row : row + 1], ids) != greedy[start + row]
    assert differing == 0
    assert accepted > 0, "some drafts were accepted, or nothing was tested"


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_text_is_the_seeds_own(smollm2, prompts, drafters, seed):
    model = smollm2[0]
    options = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=0, max_new_tokens=NEW)
    truth = {}
    for start, ids, mask in batches(prompts):
        seeds = [seed * 100 + start + row for row in range(len(ids))]
        sequences = paceline.generate(model, ids, mask, seed=seeds, **options)
        for row in range(len(ids)):
            truth[start + row] = new(sequences[row : row + 1], ids)
    for setting, (name, tree) in SETTINGS.items():
        order = list(range(len(prompts)))[:: -1 if "tree" in setting else 1]
        for start, ids, mask in batches([prompts[i] for i in order]):
            rows = order[start : start + len(ids)]
            sequences = paceline.generate(
                model,
                ids,
                mask,
                drafter=drafters[name],
                tree=tree,
                seed=[seed * 100 + i for i in rows],
                **options,
            )
            for row, index in enumerate(rows):
                assert new(sequences[row : row + 1], ids) == truth[index], (setting, seed, index)
    lone = paceline.generate(model, prompts[0], drafter="ngram", seed=[seed * 100], **options)
    assert new(lone, prompts[0]) == truth[0]
