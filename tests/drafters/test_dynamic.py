"""Trees grown best-first on the device: the reference's tree, the target's text, and no orphans."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines import runs
from paceline.spec.tree import DynamicShape, TreeShape

from support.models import noisy_copy, tiny_llama
from support.tape import tape_executor


@torch.no_grad()
def grown(model, text, shape, temperature=1.0):
    """The paths (tuples of tokens) of the best-first tree, by cache-less forwards of every path."""
    pool, frontier = {}, {(): 0.0}
    for _ in range(shape.max_depth):
        level = {}
        for path, score in frontier.items():
            logits = model(input_ids=torch.tensor([[*text, *path]]), use_cache=False).logits[0, -1].float()
            best = (logits / temperature).log_softmax(-1).topk(shape.width)
            for token, value in zip(best.indices.tolist(), best.values.tolist()):
                level[(*path, token)] = score + value - 1e-3
        pool |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: shape.width])
    return set(sorted(pool, key=pool.get, reverse=True)[: shape.nodes - 1])


def paths_of(event):
    paths = {0: ()}
    for node, parent in enumerate(event.parents[1:], 1):
        assert 0 <= parent < node, "an orphan"
        paths[node] = (*paths[parent], event.tokens[node])
    return set(paths.values()) - {()}


@pytest.mark.parametrize("spec", ["dynamic:12x4x3", "dynamic:2x1x1", "dynamic:9x2x4", "dynamic:5x4x1"])
@pytest.mark.parametrize("way", [dict(do_sample=False), dict(do_sample=True, temperature=0.7, top_k=0)])
def test_trees_and_text(target, draft, ragged, spec, way):
    ids, mask = ragged
    options = dict(max_new_tokens=16, seed=3, return_dict_in_generate=True, **way)
    truth = paceline.generate(target, ids, mask, **options).sequences
    out = paceline.generate(target, ids, mask, drafter=draft, tree=spec, **options)
    assert torch.equal(out.sequences, truth)
    shape = TreeShape.parse(spec)
    for row in (0, 2):
        text = ids[row][mask[row] == 1].tolist()
        for event in [event for event in out.trace.events if event.row == row]:
            assert paths_of(event) == grown(draft.model, text, shape, way.get("temperature", 1.0))
            text += event.committed
    assert len({tuple(event.parents) for event in out.trace.events}) > 1 or spec in ("dynamic:2x1x1", "dynamic:5x4x1")


def test_ties_cannot_orphan_a_child(target, ragged):
    """A draft that finds all tokens equally likely, and one that is certain (log q = 0 along a path)."""
    flat, certain = tiny_llama(tie_word_embeddings=False), tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        certain.model.norm.weight.mul_(1e4)
    for model in (flat, certain):
        out = paceline.generate(
            target, *ragged, drafter=ModelDrafter(model), tree="dynamic:14x5x3", do_sample=False, max_new_tokens=12,
            return_dict_in_generate=True,
        )  # fmt: skip
        for event in out.trace.events:
            assert len(paths_of(event)) == 13, "all different, all with their parents"
        assert torch.equal(out.sequences, paceline.generate(target, *ragged, do_sample=False, max_new_tokens=12))


def test_forwards_beyond_the_tree_have_slots(target):
    """Level by level the draft forwards 21 nodes to choose 4, up to the last slots of its cache."""
    drafter, prompt = ModelDrafter(noisy_copy(target)), torch.arange(5, 13)[None]
    options = dict(do_sample=False, max_new_tokens=64 - 8 - 4 - 1)
    plain = paceline.generate(target, prompt, **options)
    assert torch.equal(paceline.generate(target, prompt, drafter=drafter, tree="dynamic:4x6x4", **options), plain)


def test_dynamic_trees_are_captured(ragged, monkeypatch):
    """One recording grows other trees on other prompts."""
    model = tiny_llama(seed=2)
    drafter = ModelDrafter(noisy_copy(model))
    ids, mask = ragged
    with tape_executor(monkeypatch) as tapes:
        for seed, batch in enumerate([(ids, mask), (ids.flip(0), mask.flip(0)), (ids, mask)]):
            options = dict(drafter=drafter, tree="dynamic:10x4x3", max_new_tokens=20, seed=seed, do_sample=True)
            truth = paceline.generate(model, *batch, executor="eager", **options)
            assert torch.equal(paceline.generate(model, *batch, executor="tape", **options), truth)
    assert len(tapes) == 1 and tapes[0].tape.offences == [] and tapes[0].replays > 5
    runs.reset(model)


@pytest.mark.slow
def test_a_dynamic_step_is_one_graph(ragged):
    from paceline.spec.plan.step_times import open_idle
    from paceline.spec.step import step
    from torch._dynamo.testing import CompileCounter

    model = tiny_llama(seed=2)
    runner = open_idle(model, "eager", ModelDrafter(noisy_copy(model)), TreeShape.parse("dynamic:10x4x3"), 128)
    counter = CompileCounter()
    runner.engine.idle_step()
    traced = torch.compile(lambda: step(runner.engine, lambda phase: None), backend=counter, fullgraph=True)
    with torch.no_grad():
        traced(), traced()
    assert counter.frame_count == 1


def test_a_dynamic_tree_beats_a_static_one_of_its_size(target, draft):
    torch.manual_seed(1)
    prompts = torch.randint(1, 61, (12, 8))
    steps = {}
    for tree in ("dynamic:13x4x4", "3x3"):
        out = paceline.generate(
            target, prompts, drafter=draft, tree=tree, do_sample=False, max_new_tokens=40, return_dict_in_generate=True
        )
        steps[tree] = out.trace.summary()["tokens_per_step"]
    assert steps["dynamic:13x4x4"] > steps["3x3"]


@pytest.mark.parametrize("spec", ["dynamic:99x2x3", "dynamic:1x2x3", "dynamic:4x0x3", "dynamic:4x2", "dynamic:axbxc"])
def test_malformed_sizes_are_refused(spec):
    with pytest.raises(ValueError, match=r"dynamic:.*nodes, depth, width") as caught:
        TreeShape.parse(spec)
    assert "\n" not in str(caught.value)
    assert DynamicShape(13, 2, 3).max_children == 3


def test_other_drafters_and_rules_refuse(target, draft, ragged):
    with pytest.raises(ValueError, match="fixed trees only"):
        paceline.generate(target, *ragged, drafter="ngram", tree="dynamic:8x3x3", max_new_tokens=4)
    with pytest.raises(ValueError, match="without drawing"):
        paceline.generate(
            target, *ragged, drafter=draft, tree="dynamic:8x3x3", verify="residual", do_sample=True, max_new_tokens=4
        )
