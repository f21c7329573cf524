"""Two drafters side by side: each part's tokens in its own nodes, the target's text, and more of it than either's."""

from dataclasses import replace
from types import SimpleNamespace

import paceline
import pytest
import torch
from paceline.drafters.beside import COPIED, Beside, divided
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import cli
from paceline.spec.plan.calibration import calibrate
from paceline.spec.plan.replay import Replay, aligned, plan_side_by_side, walk_together
from paceline.spec.plan.trees import grow
from paceline.spec.proposal import NO_TOKEN, DrafterTraits, DraftRequest, DraftSampling
from paceline.spec.tree import TreeShape

from support.heads import open_session
from support.models import fitted_heads, tiny_llama

TREES = ["4x2x1+chain:6", "2x1x1", "2x1+chain:1", (-1, 0, 0, 1, 1, 2, 3, 5)]


@pytest.fixture(scope="module")
def heads(target):
    return fitted_heads(target, "hydra", known=40)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_every_node_belongs_to_one_part(tree):
    shape = TreeShape.parse(tree)
    first, second = divided(shape)
    assert sorted(first[1:] + second[1:]) == list(range(1, len(shape))) and first[0] == second[0] == 0
    last = [node for node, parent in enumerate(shape.parents) if parent == 0][-1]
    for node in range(1, len(shape)):
        top = node
        while shape.parents[top] != 0:
            top = shape.parents[top]
        assert (node in second) == (top == last)
    joined = shape.part(first).beside(shape.part(second))
    assert joined == shape, "taken apart and put together again"


def test_trees_behind_one_root():
    assert TreeShape.parse("2x1+chain:3").parents == (-1, 0, 0, 0, 1, 2, 3, 6)
    assert TreeShape.parse("2+chain:1+chain:2").parents == (-1, 0, 0, 0, 0, 4)
    for text in ("2x1+2x2", "chain:2+", "+chain:2", "dynamic:8x4x2+chain:2", "2+chain:x"):
        with pytest.raises(ValueError, match="neither"):
            TreeShape.parse(text)


@pytest.mark.parametrize("sampling", [DraftSampling(), DraftSampling("shared")], ids=str)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_each_part_drafts_as_it_does_alone(target, heads, tree, sampling):
    shape = TreeShape.parse(tree)
    _, state = open_session(target, heads, shape, sampling)
    state.tokens[:, :4] = state.tokens[:, 5:6]  # so that prompt lookup finds something in the longer row
    parts = MedusaDrafter(heads), NgramDrafter()
    request = DraftRequest(2, 64, 61, torch.device("cpu"), shape, sampling, target)
    tokens = Beside(*parts).open(request).propose(state).tokens
    found = 0
    for drafter, nodes in zip(parts, divided(shape)):
        alone = DraftRequest(2, 64, 61, torch.device("cpu"), shape.part(nodes), sampling, target)
        own = drafter.open(alone).propose(state).tokens
        assert torch.equal(tokens[:, nodes], own)
        found += int((own[:, 1:] >= 0).sum() > 0)
    assert found == 2


@pytest.mark.slow
def test_texts_are_the_targets_own_and_longer_steps_than_either(target, heads, ragged):
    both = Beside(MedusaDrafter(heads), NgramDrafter())
    for sampling in (dict(do_sample=False), dict(do_sample=True, top_k=0, temperature=0.6)):
        options = dict(seed=5, max_new_tokens=40, **sampling)
        truth = paceline.generate(target, *ragged, **options)
        for rule in ("match", "typical"):
            for tree in (None, *TREES):
                found = paceline.generate(target, *ragged, drafter=both, tree=tree, verify=rule, **options)
                assert rule == "typical" or torch.equal(found, truth), (sampling, tree)
    steps = {}
    for name, drafter, tree in (
        ("both", both, "2x2x1+chain:4"), ("heads", both.parts[0], "2x2x1"), ("ngram", both.parts[1], "chain:4"),
    ):  # fmt: skip
        options = dict(do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
        trace = paceline.generate(target, *ragged, drafter=drafter, tree=tree, **options).trace
        steps[name] = trace.summary()["tokens_per_step"]
    assert steps["both"] > max(steps["heads"], steps["ngram"]), steps


@pytest.fixture(scope="module")
def replays(target, heads):
    """Both parts calibrated on the same prompts, and these."""
    torch.manual_seed(3)
    prompts = [torch.randint(1, 61, (1, length)) for length in (3, 9, 5)]
    encoded = [{"input_ids": ids} for ids in prompts]
    parts = MedusaDrafter(heads), NgramDrafter()
    return tuple(calibrate(target, part, encoded, "match", 0.0, 50) for part in parts), prompts


@pytest.mark.slow
def test_both_replayed_together_take_the_steps_of_decoding(target, heads, replays):
    (first, second), prompts = replays
    both, counts = Beside(MedusaDrafter(heads), NgramDrafter()), set()
    for own, length in (("2x1", 1), ("3x1", 4), ("chain:2", 6)):
        tokens, steps = walk_together(first.reach(TreeShape.parse(own)), second.reach(TreeShape.chain(length)))
        really = committed = 0
        for ids in prompts:
            options = dict(drafter=both, tree=f"{own}+chain:{length}", do_sample=False, max_new_tokens=50)
            events = paceline.generate(target, ids, return_dict_in_generate=True, **options).trace.events
            really += len(events)
            committed += sum(len(event.committed) for event in events)
        assert (tokens, steps) == (committed, really)
        counts.add(steps)
    assert len(counts) > 1


def test_replays_are_compared_as_far_as_their_texts_agree(replays):
    first, second = replays[0]
    parted = Replay([[replace(event, tokens=[60, *event.tokens[1:]]) if place == 7 else event
                      for place, event in enumerate(events)] for events in second.texts])  # fmt: skip
    cut = aligned((first, parted))
    assert [len(events) for events in cut[0].texts] == [len(events) for events in cut[1].texts]
    assert all(len(events) == 7 or events[7].tokens[0] == 60 for events in cut[0].texts) and cut[0].texts[0]
    assert aligned((first, second)) == (first, second)


def test_the_plan_for_both_is_the_best_of_all_that_are_tried(replays):
    replays, _ = replays
    costs, drafts = {1: 1.0, 16: 1.3, 24: 3.0}, ({0: 0.0, 4: 0.2}, {0: 0.0, 1: 0.05, 6: 0.1})
    plan = plan_side_by_side(replays, costs, drafts)
    parents, _ = grow(replays[0].rates(TreeShape.chain(0)), 24, 4)
    best = 1.0
    for size in range(2, len(parents) + 1):
        for length in range(1, 7):
            tree, nodes = TreeShape(tuple(parents[:size])), size + length
            if nodes > 24:
                continue
            tokens, steps = walk_together(replays[0].reach(tree), replays[1].reach(TreeShape.chain(length)))
            seconds = 1 + 0.3 * (nodes - 1) / 15 if nodes <= 16 else 1.3 + 1.7 * (nodes - 16) / 8
            seconds += 0.2 * tree.max_depth / 4 + (0.05 + 0.05 * (length - 1) / 5)
            best = max(best, tokens / steps / seconds)
    assert plan.speedup == pytest.approx(best) and best > 1
    assert plan_side_by_side(replays, {1: 1.0, 24: 90.0}, drafts).shape.parents == (-1,), "not to speculate is a choice"


@pytest.mark.slow
def test_they_are_planned_for_and_evaluated_in_a_sentence(heads, tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    model = tiny_llama(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    loaded, _ = paceline.load_target(tmp_path / "target", torch.float32, "cpu")
    fitted_heads(loaded, "hydra").save(tmp_path / "heads", torch.float32)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["ABCABCABC"]}\n{"prompt": "XYZXYZ"}\n')
    pair = ["--model", str(tmp_path / "target"), "--drafter", f"{tmp_path / 'heads'}+ngram"]
    prompts = ["--calibrate", str(tmp_path / "prompts.jsonl")]
    assert cli.main(["plan", *pair, *prompts, "--max-new-tokens", "20", "-o", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert "\nheads\n" in printed and "\nngram\n" in printed and "tokens per step expected" in printed
    assert "heads alone: " in printed and "ngram alone: " in printed
    assert cli.main(["profile", *pair]) == 0
    assert "\nheads\n" in capsys.readouterr().out
    assert cli.main(["generate", *pair, "--prompt", "ABC", "--max-new-tokens", "12", "--tree", "auto"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", *pair, "--from", str(tmp_path / "run.jsonl")]) == 2
    assert "does not tell the shares" in capsys.readouterr().err
    assert cli.main(["plan", *pair, *prompts, "--temperature", "0.5", "--verify", "residual"]) == 2
    assert "'heads' alone draft" in capsys.readouterr().err
    assert cli.main(["evaluate", pair[3], *pair[:2], "--prompts", prompts[1], "-o", str(tmp_path / "a.json")]) == 2
    assert "evaluate its parts" in capsys.readouterr().err


def test_what_cannot_stand_side_by_side_is_refused_in_a_sentence(target, heads, ragged):
    with pytest.raises(ValueError, match="'loner' follows no tree but its own"):
        Beside(NgramDrafter(), SimpleNamespace(name="loner", traits=DrafterTraits()))
    both = Beside(MedusaDrafter(heads), NgramDrafter())
    with pytest.raises(ValueError, match=r"'medusa\+ngram' is two drafters already"):
        Beside(both, NgramDrafter())
    two = "two or more branches, the last one a chain"
    for tree, words in (("dynamic:8x4x2", "fixed trees only"), ("chain:4", two), ("2x2", two)):
        with pytest.raises(ValueError, match=words):
            paceline.generate(target, *ragged, drafter=both, tree=tree, max_new_tokens=4)
    backwards = Beside(NgramDrafter(), MedusaDrafter(heads))
    with pytest.raises(ValueError, match="without drawing them"):
        paceline.generate(target, *ragged, drafter=backwards, verify="residual", do_sample=True, max_new_tokens=4)


def test_a_tree_of_the_root_alone_is_plain_decoding(target, heads, ragged):
    both, options = Beside(MedusaDrafter(heads), NgramDrafter()), dict(do_sample=False, max_new_tokens=12)
    out = paceline.generate(target, *ragged, drafter=both, tree="chain:0", return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, paceline.generate(target, *ragged, **options))
    assert out.trace.summary()["tokens_per_step"] == 1


def test_where_drafts_are_drawn_the_first_drafts_alone(target, heads):
    """The same tokens, law and logits as without the other, so `residual` has the target's law with them."""
    shape, own = TreeShape.parse("2x2+chain:3"), DraftSampling("own")
    _, state = open_session(target, heads, shape, own)
    both, first = Beside(MedusaDrafter(heads), NgramDrafter()), divided(shape)[0]
    said = both.open(DraftRequest(2, 64, 61, torch.device("cpu"), shape, own, target)).propose(state)
    alone = (
        MedusaDrafter(heads)
        .open(DraftRequest(2, 64, 61, torch.device("cpu"), TreeShape.parse("2x2"), own, target))
        .propose(state)
    )
    assert (said.law, said.coupling) == (alone.law, alone.coupling) == ("without_replacement", "own")
    assert torch.equal(said.tokens[:, first], alone.tokens)
    assert torch.equal(said.draft_logits[:, first], alone.draft_logits)
    second = [node for node in range(len(shape)) if node not in first]
    assert (said.tokens[:, second] == NO_TOKEN).all()


def test_they_are_loaded_by_their_names(target, heads, ragged, tmp_path):
    heads.save(tmp_path / "heads", torch.float32)
    both = paceline.load_drafter(f"{tmp_path / 'heads'}+ngram", target)
    assert both.name == "heads+ngram" and both.traits.taps == ("head",) and both.traits.vocab_size == 61
    assert both.default_shape == both.parts[0].default_shape.beside(TreeShape.chain(COPIED))
    truth = paceline.generate(target, *ragged, do_sample=False, max_new_tokens=12)
    found = paceline.generate(target, *ragged, drafter=both, do_sample=False, max_new_tokens=12)
    assert torch.equal(found, truth)
    with pytest.raises(ValueError, match="nothing_here"):
        paceline.load_drafter("nothing_here+ngram", target)
