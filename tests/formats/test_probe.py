"""The target's own text tells how a head is meant, whatever its config says, and whether it is for this target."""

from dataclasses import replace

import paceline
import pytest
import torch
from formats.published import KNOWN, V, config_of, eagle1, eagle3, stepping_target, write
from paceline.drafters.eagle.network import EagleNetwork
from paceline.drafters.eagle.settings import EagleSettings
from paceline.drafters.formats.conventions import candidates
from paceline.drafters.formats.eagle_config import EagleConfig
from paceline.drafters.formats.probe import BEGINNINGS, TOKENS, Agreement, agreement, own_text
from paceline.spec.target.taps import HEAD

from support.models import tiny_llama
from support.sentences import sentence

IDS = "eagle_aux_hidden_state_layer_ids"
RIGHT = {IDS: [2, 4, 7], "norm_before_residual": True, "rope_theta": 100.0}
WRONG = {
    "ids of layers": ({IDS: [1, 3, 6]}, "hidden states [1, 3, 6]; it is read with hidden states [2, 4, 7], and"),
    "ids counted twice": (
        {IDS: None, "eagle_config": {IDS: [2, 4, 7]}},
        "hidden states [3, 5, 8]; it is read with hidden states [2, 4, 7], and",
    ),
    "twice": ({IDS: [2, 2, 4], "eagle_config": {IDS: [1, 3, 6]}}, "hidden states [2, 2, 4] (one of them twice); it is"),
    "too many": (
        {IDS: [1, 3, 4, 6], "target_layer_ids": [0, 2, 5]},
        "hidden states [1, 3, 4, 6] (its fc reads 3); it is read with hidden states [2, 4, 7], and",
    ),
    "base": ({"rope_theta": 1e6}, "rope base 1e+06; it is read with rope base 100, and"),
    "no base": ({"rope_theta": None}, "rope base 10000; it is read with rope base 100, and"),
    "residual": (
        {"norm_before_residual": False},
        "norm_before_residual=false; it is read with norm_before_residual=true, and",
    ),
    "no residual": (
        {"norm_before_residual": None},
        "norm_before_residual=false; it is read with norm_before_residual=true, and",
    ),
    "all of them": (
        {IDS: [1, 3, 6], "rope_theta": None, "norm_before_residual": None},
        "hidden states [1, 3, 6], rope base 10000, norm_before_residual=false; it is read with hidden",
    ),
}


def test_what_the_config_says_is_taken_where_it_is_right(learned, tmp_path, capsys):
    folder, generator = learned.save(tmp_path / "head", **RIGHT), torch.get_rng_state()
    drafter = paceline.load_drafter(folder, learned.target)
    assert torch.equal(torch.get_rng_state(), generator), "a sampled text is the same behind it"
    assert drafter.network.settings.taps == (1, 3, 6) and drafter.network.settings.norm_before_residual
    assert drafter.name == "head" and drafter.traits.kind == "eagle" and len(drafter.network.vocabulary) == V - 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("ids", "why"),
    [([0, 4, 7], "0 are the embeddings, which are not read"), ([2, 4, 9], "this target has 8 layers"),
     ([2, 2, 4], "one of them twice"), ([2, 4], "its fc reads 3")],
)  # fmt: skip
def test_layers_that_do_not_fit_are_not_replaced_in_silence(learned, tmp_path, capsys, ids, why):
    paceline.load_drafter(learned.save(tmp_path / "head", **{**RIGHT, IDS: ids}), learned.target)
    said = capsys.readouterr().err
    assert f"by its config it has hidden states {ids} ({why}); it is read with hidden states [2, 4, 6], and so" in said
    assert said.endswith(" of the target's own text\n")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_config_is_found_and_said(learned, tmp_path, capsys, case):
    changes, words = WRONG[case]
    config = {name: value for name, value in {**RIGHT, **changes}.items() if value is not None}
    drafter = paceline.load_drafter(learned.save(tmp_path / "head", **config), learned.target)
    settings = drafter.network.settings
    assert settings.taps == drafter.traits.taps == (1, 3, 6) and settings.norm_before_residual
    assert settings.layer["rope_parameters"] == {"rope_type": "default", "rope_theta": 100.0}
    said = capsys.readouterr().err
    assert f"by its config it has {words}" in said and said.count("\n") == 1 and "of the target's own text" in said


def test_the_text_is_the_targets_with_several_tokens_per_step(learned, tmp_path):
    alone = paceline.load_drafter(learned.save(tmp_path, **RIGHT), learned.target)
    beside = paceline.load_drafter(f"{tmp_path}+ngram", learned.target)
    prompt = learned.text[5:9, :4]
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
    truth = learned.target.generate(prompt, **options)
    options |= dict(return_dict_in_generate=True)
    for drafter, tree in ((alone, "3x2"), (alone, "dynamic:8x3x2"), (beside, "chain:3+chain:4")):
        out = paceline.generate(learned.target, prompt, drafter=drafter, tree=tree, **options)
        assert torch.equal(out.sequences, truth) and out.trace.summary()["tokens_per_step"] > 1.3


def test_a_drafter_is_tried_once_for_all_its_weights(learned, tmp_path, capsys):
    folder = learned.save(tmp_path / "head", **{**RIGHT, IDS: [1, 3, 6]})
    paceline.load_drafter(folder, learned.target, weights="auto")
    assert capsys.readouterr().err.count("hidden states [2, 4, 7]") == 1


def test_random_heads_are_refused(learned, tmp_path):
    refused = []
    for seed in range(3):
        torch.manual_seed(seed)
        for make in (eagle1, eagle3, lambda: eagle3(known=V)):
            folder = write(tmp_path / f"head{len(refused)}", make(), config_of())
            refused.append(sentence(lambda folder=folder: paceline.load_drafter(folder, learned.target)))
    assert len(refused) == 9 and all("tokens of this target's own text, no more than by chance" in x for x in refused)


def test_a_head_of_another_target_of_the_same_sizes_is_refused(learned, tmp_path):
    folder = learned.save(tmp_path, **RIGHT, base_model_name_or_path="someone/its-target")
    words = (
        "however its layer ids, rope base and residual are read: it was made for another target, and its config names"
    )
    sentence(lambda: paceline.load_drafter(folder, stepping_target(step=11)), words, "someone/its-target")


def test_what_knows_nothing_of_the_target_is_chance():
    chosen, every = torch.tensor([[7] * 60 + [1, 2, 3, 4] * 10]), torch.arange(V)

    def guesses(*right):
        """Right at these tokens, and else never."""
        logits = torch.nn.functional.one_hot(chosen, V).float()
        hit = torch.zeros(100, dtype=torch.bool).index_fill(0, torch.tensor(right, dtype=torch.int64), True)
        return agreement(torch.where(hit[None, :, None], logits, logits.roll(20, 2)), chosen, every)

    constant = agreement(torch.zeros(1, 100, V).index_fill(2, torch.tensor([7]), 1.0), chosen, every)
    assert constant.hits == 60 and not constant.above_chance(constant), "the commonest token, whatever the text"
    some, none = guesses(*range(0, 100, 3)), guesses()
    assert some.hits == 34 and some.above_chance(none), "by what it reads of the target"
    assert not some.above_chance(some), "by what it knows of tokens"
    assert not guesses(*range(14)).above_chance(guesses(*range(3, 15)))
    assert guesses(*range(100)).above_chance(guesses(*range(100))), "nearly all, without any state"


def test_a_drafter_that_is_given_states_of_other_texts_is_refused(learned, tmp_path, monkeypatch):
    """What it knows of tokens is not the target's."""
    from paceline.drafters.formats import probe

    own = probe.own_text

    def of_other_texts(*given):
        text = own(*given)
        return replace(text, features={tap: states.roll(5, 0) for tap, states in text.features.items()})

    monkeypatch.setattr(probe, "own_text", of_other_texts)
    folder = learned.save(tmp_path / "head", **RIGHT)
    sentence(lambda: paceline.load_drafter(folder, learned.target), "no more than by chance")


def test_agreement_counts_like_a_loop():
    torch.manual_seed(0)
    known = torch.randperm(V)[:KNOWN].sort().values
    index = torch.full((V,), KNOWN).index_copy(0, known, torch.arange(KNOWN))
    logits, chosen = torch.randn(3, 9, KNOWN), torch.randint(0, V, (3, 9))
    guesses = known[logits.argmax(-1)]
    got = agreement(logits, chosen, index)
    pairs = [pair for pair in zip(guesses.flatten().tolist(), chosen.flatten().tolist()) if pair[1] in known]
    assert (got.hits, got.tried) == (sum(a == b for a, b in pairs), len(pairs)) and 0 < len(pairs) < 27
    assert got.expected == pytest.approx(sum(a == b for a, _ in pairs for _, b in pairs) / len(pairs))
    logprobs = logits.log_softmax(-1).flatten(0, 1)
    told = [logprobs[i, index[token]] for i, token in enumerate(chosen.flatten().tolist()) if token in known]
    torch.testing.assert_close(got.logprobs, torch.stack(told))


def test_what_computes_nothing_is_the_worst():
    chosen, every = torch.arange(20)[None] % 7, torch.arange(V)
    poor, nothing = torch.randn(1, 20, V), torch.full((1, 20, V), float("nan"))
    masked = torch.zeros(1, 20, V).masked_fill(torch.arange(V) < 7, -torch.inf)
    for other in (nothing, masked):
        assert agreement(poor, chosen, every).better_than(agreement(other, chosen, every))
        assert not agreement(other, chosen, every).better_than(agreement(poor, chosen, every))


def test_luck_does_not_overrule_a_config():
    torch.manual_seed(0)
    base = -torch.rand(100)
    right = base < 0
    one = Agreement(base, right, 2.0)
    assert not Agreement(base + 0.05 * torch.randn(100), right, 2.0).better_than(one)
    assert Agreement(base + 0.05 + 0.05 * torch.randn(100), right, 2.0).better_than(one)
    assert not one.better_than(one)


def test_the_text_is_greedy_and_the_states_are_the_targets():
    target = tiny_llama(V, num_hidden_layers=5)
    text = own_text(target, {0, 3, HEAD})
    rows = torch.cat([torch.ones(32, 1, dtype=torch.int64), torch.tensor(BEGINNINGS)[:, None] % V], dim=1)
    whole = target.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=TOKENS, no_repeat_ngram_size=3
    )
    assert torch.equal(text.tokens, whole[:, 1:])
    out = target(whole, output_hidden_states=True)
    assert torch.equal(text.chosen, out.logits.argmax(-1)[:, 1:])
    for tap, state in ((0, 1), (3, 4), (HEAD, -1)):
        torch.testing.assert_close(text.features[tap], out.hidden_states[state][:, :-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "lists"),
    [
        ({}, [[2, 4, 5], [3, 5, 6], [1, 3, 4], [2, 4, 6]]),
        ({IDS: [2, 4, 7]}, [[2, 4, 7], [3, 5, 8], [1, 3, 6], [2, 4, 5], [2, 4, 6]]),
        ({"eagle_config": {IDS: [1, 3, 6]}}, [[2, 4, 7], [3, 5, 8], [1, 3, 6], [2, 4, 5], [2, 4, 6]]),
        ({IDS: [2, 4, 7], "eagle_config": {IDS: [1, 3, 6]}}, [[2, 4, 7], [3, 5, 8], [1, 3, 6], [2, 4, 5], [2, 4, 6]]),
        ({"target_layer_ids": [0, 3, 6]}, [[1, 4, 7], [2, 5, 8], [2, 4, 5], [2, 4, 6]]),
        ({IDS: [7, 2, 4]}, [[2, 4, 7], [3, 5, 8], [1, 3, 6], [2, 4, 5], [2, 4, 6]]),
        ({IDS: [1, 2, 3, 4]}, [[2, 4, 5], [3, 5, 6], [1, 3, 4], [2, 4, 6]]),  # not as many as its tensors read
    ],
)
def test_lists_of_layers_that_are_tried(config, lists):
    target = tiny_llama(V, num_hidden_layers=8)
    settings = EagleSettings(
        config_of(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), range(3), fuse=True
    )
    tried = list(
        dict.fromkeys(each.settings.taps for each in candidates(EagleConfig(config, "x"), settings, target).tried)
    )
    as_states = [[8 if tap == HEAD else tap + 1 for tap in taps] for taps in tried]
    assert as_states[0] == lists[0] and sorted(as_states) == sorted(lists)


@pytest.mark.parametrize("size", [8, 16])
def test_frequencies_of_the_target_are_tried_where_they_fit_the_heads(size):
    """A target whose frequencies have a list for each pair of numbers, such as Phi-3's, and attention heads as large as
    its own, or larger."""
    long = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long |= {"original_max_position_embeddings": 64, "factor": 4.0}
    target = tiny_llama(V, num_hidden_layers=8, rope_parameters=long)
    layer = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "head_dim": size}
    layer |= {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    tried = candidates(EagleConfig({}, "x"), EagleSettings(layer, range(3), wide=True, fuse=True), target).tried
    kinds = {each.settings.layer["rope_parameters"]["rope_type"] for each in tried}
    assert kinds == {"default"} | ({"longrope"} if size == 8 else set())
    network = EagleNetwork(tried[0].settings, target)
    for each in tried:
        network.adopt(each.settings)
        assert network.rotary_emb.inv_freq.shape == (size // 2,)
