"""Small draft models: where they come from, what they count, how they are saved."""

import json

import paceline
import pytest
import torch
from paceline.drafters.complete import complete
from paceline.spec import step as step_module
from paceline.spec.target.load import load_target
from paceline.training.data.rows import Rows
from paceline.training.objectives.draft_lm import DraftObjective, Known, chain_statistics, next_tokens
from paceline.training.objectives.draft_network import from_layers
from paceline.training.objectives.objective import NO_LABEL, acceptance
from paceline.training.objectives.target import OnlineTarget, ScaledHead
from paceline.training.ranks import judge_of
from safetensors.torch import save_file
from test_target import tiny
from training_runs import random_rows, write_data, write_target
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_llama

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return write_target(tmp_path_factory.mktemp("target") / "tiny", tokenizer, tie_word_embeddings=True)


@pytest.fixture
def model(folder):
    return load_target(folder)[0]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    from paceline.training.data.rows import open_data

    splits, _ = open_data(write_data(tmp_path_factory.mktemp("rows"), random_rows(3), random_rows(1)))
    rows: Rows = splits["train"]
    return rows.batch([0, 1, 2])


def build(model, **settings):
    return DraftObjective.build({"kind": "draft_lm", **settings}, model)


def obvious_statistics(objective, batch, depths):
    """Position by position: walk along the text as long as the draft is right and tokens count."""
    hits, tried = [0] * depths, [0] * depths
    for ids, mask, document in zip(batch["input_ids"], batch["loss_mask"], batch["document"]):
        for start in range(len(ids) - 1):
            for depth in range(depths):
                here = start + depth
                if here + 1 >= len(ids) or document[here] != document[here + 1] or document[here] < 0:
                    break
                if not mask[here + 1]:
                    break
                tried[depth] += 1
                text = ids[: here + 1][document[: here + 1] == document[here]]
                if objective.model(input_ids=text[None]).logits[0, -1].argmax() != ids[here + 1]:
                    break
                hits[depth] += 1
    return hits, tried


@torch.no_grad()
def test_statistics_and_ranks_are_those_of_a_walk_along_the_text(model, batch):
    objective = build(model, sizes=SIZES, depths=3, chunk=5).eval()
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    for _ in range(25):  # until it is right now and then
        with torch.enable_grad():
            losses = objective(batch, None)
            (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = objective(batch, None)
    hits, tried = obvious_statistics(objective, batch, 3)
    assert losses.hits.tolist() == hits and losses.tried.tolist() == tried and 0 < hits[2] < tried[0]
    assert losses.counted == tried[0]
    measured = acceptance(objective, [(batch, None)], width=2)
    assert [row[0] for row in measured.hits][:1] == hits[:1] and measured.trials[0][0] == tried[0]
    ranks = objective.label_ranks(batch, None)
    assert ranks.shape == (tried[0], 3) and (ranks[:, 0] != NO_LABEL).all()
    best = ranks == 0
    assert [int(best[:, : depth + 1].all(1).sum()) for depth in range(3)] == hits


def test_only_the_targets_own_tokens_of_the_same_document_count(batch):
    labels, counted = next_tokens(batch)
    assert torch.equal(labels, batch["input_ids"][:, 1:])
    for row in range(len(labels)):
        for place in range(labels.shape[1]):
            document = batch["document"][row, place : place + 2].tolist()
            wanted = document[0] == document[1] >= 0 and batch["loss_mask"][row, place + 1] == 1
            assert bool(counted[row, place]) == wanted
    one = torch.ones(1, 2, dtype=torch.bool)
    hits, tried = chain_statistics(one, one, 4)
    assert hits.tolist() == tried.tolist() == [2, 1, 0, 0], "deeper than the text is long"


@pytest.mark.parametrize("losses", [{"cross_entropy": 1.0}, {"forward_kl": 1.0, "jsd": 0.5}])
def test_the_loss_is_the_obvious_one(model, batch, losses):
    objective = build(model, sizes=SIZES, losses=losses, chunk=4)
    assert objective.taps == (() if "cross_entropy" in losses else ("head",))
    seen = OnlineTarget(model).view(batch, "train", [0, 1, 2])
    given = objective(batch, seen if objective.taps else None)
    labels, counted = next_tokens(batch)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    q = objective.model(**inputs).logits[:, :-1][counted].double().log_softmax(-1)
    p = model(**inputs).logits[:, :-1][counted].double().log_softmax(-1)
    if "jsd" in losses:
        m = ((p.exp() + q.exp()) / 2).log()
        kl = lambda a, b: (a.exp() * (a - b)).sum()  # noqa: E731
        wanted = kl(p, q) + 0.5 * (kl(p, m) + kl(q, m)) / 2
    else:
        wanted = -q.gather(1, labels[counted][:, None]).sum()
    torch.testing.assert_close(given.total.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
        ("gemma3_text", {"layer_types": [*["sliding_attention"] * 2, "full_attention"], "sliding_window": 4}),
        ("gpt_neox", {}),
        ("gpt2", {"n_embd": 32, "n_head": 4}),
        ("mixtral", {"num_local_experts": 3}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)  # fmt: skip
def test_layers_are_taken_from_any_plain_stack(family, options):
    """All layers give the target itself; a choice gives what the target gives when the others pass their input on."""
    model = tiny(family, **{"num_hidden_layers": 3, **options})
    ids = torch.randint(3, 61, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(from_layers(model, [0, 1, 2]).eval()(ids).logits, model(ids).logits)
        chosen = from_layers(model, [0, 2]).eval()(ids, use_cache=False).logits
        stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
        middle = stack[1]

        def pass_on(module, args, kwargs, out):
            states = args[0] if args else kwargs["hidden_states"]
            return (states, *out[1:]) if isinstance(out, tuple) else states

        handle = middle.register_forward_hook(pass_on, with_kwargs=True)
        torch.testing.assert_close(chosen, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
        handle.remove()


def test_shared_weights_are_the_targets_and_stay(model, batch):
    objective = build(model, layers=[1], embeddings="target", head="target", losses={"forward_kl": 1.0})
    assert set(objective.parameter_groups()) == {"layers"}
    objective(batch, OnlineTarget(model).view(batch, "train", [0])).total.backward()
    draft = objective.model
    assert draft.lm_head.weight is draft.model.embed_tokens.weight and draft.lm_head.weight.grad is None
    assert draft.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr(), "not even copied"
    untied = build(model, layers=[1], head="target")
    assert set(untied.parameter_groups()) == {"embeddings", "layers"}
    assert not untied.model.config.tie_word_embeddings
    assert torch.equal(untied.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    own = build(model, sizes=SIZES)
    assert set(own.parameter_groups()) == {"embeddings", "layers"} and own.model.config.tie_word_embeddings


def test_an_untied_targets_head_is_its_own(tmp_path):
    target = tiny_llama(tie_word_embeddings=False)
    build(target, sizes=SIZES).save(tmp_path)
    draft = build(target, start=str(tmp_path), embeddings="target", head="target").model
    assert torch.equal(draft.get_input_embeddings().weight, target.get_input_embeddings().weight)
    assert torch.equal(draft.get_output_embeddings().weight, target.get_output_embeddings().weight)
    assert not draft.config.tie_word_embeddings


def test_a_head_with_a_bias_is_not_shared_with_a_llama():
    target = tiny("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
    with pytest.raises(ValueError, match="has a bias, for which the draft's architecture has no place"):
        build(target, sizes=SIZES, head="target")


@pytest.mark.parametrize("origin", [{"layers": [1]}, {"sizes": SIZES}])
def test_the_saved_folder_is_an_ordinary_model(model, folder, tmp_path, origin):
    objective = build(model, **origin, embeddings="target", save={"dtype": "float32"})
    objective.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, objective.model(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 61 and config["paceline_drafter"] == "draft_lm"
    assert config["architectures"] == ["LlamaForCausalLM"] and config["paceline_target"]["name"] == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=loaded, **options), plain)
    assert torch.equal(paceline.generate(model, ids, drafter=str(tmp_path), **options), plain)


def test_a_folder_without_the_targets_weights_is_completed_by_it(model, tmp_path, batch):
    settings = {"layers": [1], "embeddings": "target", "head": "target"}
    objective = build(model, **settings, save={"without_target_weights": True})
    objective.save(tmp_path / "lean")
    build(model, **settings).save(tmp_path / "whole")
    lean, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("lean", "whole"))
    assert lean < whole - 61 * 32 * 4 + 600
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(complete(tmp_path / "lean", model)(ids).logits, objective.model(ids).logits)
    assert paceline.load_drafter(tmp_path / "lean", model).name == "lean"
    with pytest.raises(ValueError, match="was made for target 'tiny'"):
        complete(tmp_path / "lean", tiny_llama(seed=4))
    further = build(model, start=str(tmp_path / "lean"), embeddings="target", head="target")
    assert torch.equal(further(batch, None).total, objective(batch, None).total), "distillation begins from pretraining"
    own = build(model, start=str(tmp_path / "lean"))
    with torch.no_grad():
        for weight in own.model.parameters():
            weight.mul_(1.5)
    own.save(tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(complete(tmp_path / "own", model)(ids).logits, own.model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no origin; give one of sizes, layers and start"),
        ({"layers": [0], "sizes": SIZES}, "sizes and layers; give one of"),
        ({"layers": [2]}, r"\[2\] must name layers of LlamaForCausalLM, which has 0 to 1"),
        ({"layers": []}, "must name layers"),
        ({"layers": [0], "depths": 0}, "must be at least 1"),
        ({"layers": [0], "save": {"without_target_weights": True}}, "nothing is; set objective.embeddings"),
        ({"sizes": {**SIZES, "hidden_size": 16}, "head": "target"}, "hidden size 16 is not the target's 32"),
        ({"sizes": {**SIZES, "num_attention_heads": 5}}, "5 heads do not divide hidden_size 32"),
        ({"sizes": {**SIZES, "num_attention_heads": 0}}, "num_attention_heads is 0; give a number of at least 1"),
        ({"sizes": {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 3}}, "3 key-value heads do not divide 4"),
        ({"start": "./none-such"}, "no such folder"),
        ({"layers": [0], "losses": {"kl": 1}}, "loss 'kl' is unknown"),
        ({"layers": [0], "head": "mine"}, "choose of own, target"),
    ],
)
def test_mistakes_are_named(model, settings, words):
    with pytest.raises(ValueError, match=words):
        build(model, **settings)


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
    torch.testing.assert_close(known.law(scaled)(hidden), scaled(hidden)[:, known.ids])
