"""What Paceline refuses comes from transformers with one warning per reason; what no call could use is refused."""

import paceline
import pytest
import torch

from support.models import noisy_copy

GREEDY = dict(max_new_tokens=16, do_sample=False)

REFUSED = {
    "beams": (dict(num_beams=2), "num_beams=2"),
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
    "no cache": (dict(use_cache=False), "use_cache"),
    "padding on the right": (dict(attention_mask=torch.tensor([[1] * 8 + [0]])), "on the left"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_comes_from_transformers_with_one_warning(model, ids, options, reason):
    options = {"inputs": ids, **GREEDY, **options}
    expected = model.generate(**options)
    with paceline.patch(model, "ngram") as patched:
        with pytest.warns(UserWarning, match=reason) as seen:
            found = [model.generate(**options) for _ in range(2)]
    assert len([w for w in seen if "transformers' own" in str(w.message)]) == 1 and seen[0].filename == __file__
    assert patched.speculated == 0 and list(patched.fell_back.values()) == [2]
    for one in found:
        assert torch.equal(getattr(one, "sequences", one), getattr(expected, "sequences", expected))


def test_a_reason_is_one_whatever_its_numbers(model, ids):
    model.train()
    with paceline.patch(model) as patched:
        with pytest.warns(UserWarning, match="is in training mode"):
            model.generate(ids, **GREEDY)
        model.eval()
        with pytest.warns(UserWarning, match="num_beams=2"):
            model.generate(ids, num_beams=2, **GREEDY)
        model.generate(ids, num_beams=3, **GREEDY)
        with pytest.warns(UserWarning, match="contrastive"), pytest.raises(ValueError, match="trust_remote_code"):
            model.generate(ids, penalty_alpha=0.5, top_k=4, max_new_tokens=3)  # as without a patch
    assert list(patched.fell_back.values()) == [1, 2, 1]


def test_the_callers_own_speculation_is_respected_in_silence(model, target, ids):
    with paceline.patch(model, "ngram") as patched, paceline.patch(target, "ngram") as assistant:
        assert torch.equal(model.generate(ids, assistant_model=target, **GREEDY), target.generate(ids, **GREEDY))
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
        model.generate(ids, custom_generate=lambda model, input_ids, **_: input_ids, **GREEDY)
    assert patched.speculated == 0 and sum(patched.fell_back.values()) == 3
    assert assistant.speculated == 1  # its cache was asked for by the other calls


def mistaken(row, text):
    if len(text) > 10:
        raise ValueError("the user's own mistake")
    return [3, 4]


def test_errors_of_the_user_and_of_decoding_are_no_fall_back(model, ids):
    with paceline.patch(model, "ngram") as patched:
        with pytest.raises(ValueError, match="own mistake"):
            model.generate(ids, prefix_allowed_tokens_fn=mistaken, **GREEDY)
        with pytest.raises(ValueError, match="Input length"):
            model.generate(ids, max_length=3)
        with pytest.raises(TypeError):
            model.generate(ids, inputs=ids)
    assert not patched.fell_back and not patched.speculated


def test_the_summary_adds_up(model, ids):
    patched, single = paceline.patch(model, "ngram"), []
    for prompt in (ids, ids.flip(1)):
        model.generate(prompt, **GREEDY)
        out = paceline.generate(model, prompt, drafter="ngram", return_dict_in_generate=True, **GREEDY)
        single.append(out.trace.summary())
    total = patched.summary()
    counts = {name: single[0][name] + single[1][name] for name in total if name.startswith("num_")}
    assert counts["num_tokens"] == 32 and counts.items() <= total.items()
    assert total["tokens_per_step"] == 32 / counts["num_spec_steps"]
    assert total["seconds"].keys() == single[0]["seconds"].keys()


USELESS = {
    "no-such-folder": dict(drafter="no-such-folder/at/all"),
    "drafter is a int": dict(drafter=3),
    "verify='mostly'": dict(verify="mostly"),
    "executor='magic'": dict(executor="magic"),
    "round": dict(tree="round"),
    "does not take 'max_new_tokens'": dict(max_new_tokens=3),
    "cannot be written": dict(trace_file="/no/such/folder/t.jsonl"),
}


def test_a_causal_lm_drafts(model, ids):
    expected = model.generate(ids, **GREEDY)
    with paceline.patch(model, noisy_copy(model)) as patched:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert patched.speculated == 1 and patched.drafter.name != "none"


@pytest.mark.parametrize("reason, settings", USELESS.items(), ids=USELESS)
def test_settings_that_no_call_could_use(model, reason, settings):
    with pytest.raises(ValueError, match=reason):
        paceline.patch(model, **settings)
    assert "generate" not in vars(model)
    with pytest.raises(ValueError, match="no transformers model"):
        paceline.patch(torch.nn.Linear(2, 2))
