"""Plans for streamed targets: step times that are kept, and the dynamic tree that is chosen by them."""

import itertools
from dataclasses import replace

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines import runs
from paceline.spec.plan import streamed
from paceline.spec.plan.calibration import by_text, calibrate, calibrated
from paceline.spec.plan.curves import Curves, measure
from paceline.spec.plan.grown import BUDGETS, NEVER, WIDEST, Grown, GrownReplay, plans, shape_of
from paceline.spec.plan.step_times import Blank, open_idle
from paceline.spec.plan.store import plan_path
from paceline.spec.plan.streamed import LEVELS, SIZES, WIDTHS, bush
from paceline.spec.plan.trees import Plan, interpolate
from paceline.spec.target.last_part import LastPart
from paceline.spec.tree import DynamicShape, TreeShape
from paceline.spec.verify import draft_sampling
from stream.pretending import ABOUT, pretending

from support.models import noisy_copy, tiny_llama


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Steps take a second and a hundredth of one for each node, drafting a tenth for each level; what was timed."""
    seen = []

    def open_idle(model, executor, drafter, shape, capacity, sampling=None, work="step"):
        seen.append((work, shape))
        return {"draft": 0.1 * shape.max_depth, "step": 1.0 + 0.01 * len(shape), "walk": 0.25}[work]

    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(streamed, "open_idle", open_idle)
    monkeypatch.setattr(streamed, "alone", lambda model, seconds, repeats, warm_up: seconds)
    return seen


def test_step_times_are_kept_for_what_they_depend_on(timed, tmp_path):
    model = tiny_llama()
    drafters = [ModelDrafter(noisy_copy(model)), paceline.load_drafter("ngram", model)]
    with pretending(model):
        measured = measure(model, drafters, "eager")
        assert measured.target == {size: pytest.approx(1.0 + 0.01 * size) for size in SIZES}
        assert [work for work, _ in timed].count("step") == len(SIZES)
        grown, fixed = measured.grown
        assert {width: list(curve) for width, curve in grown.items()} == {width: [0, *LEVELS] for width in WIDTHS}
        assert grown[8][16] == pytest.approx(1.6) and list(fixed) == [1] and list(fixed[1]) == [0, 1, 8]
        assert measured.of(1, 2).step(TreeShape.chain(7)) == pytest.approx(1.08 + 0.7)
        del timed[:]
        again = measure(model, drafters, "eager")
        assert again.target == measured.target and again.measured == measured.measured != ""
        assert again.walking == measured.walking == 0.0, "so few scores are computed at once"
        assert {work for work, _ in timed} == {"draft"}, "steps are not timed again"
        measure(model, [], "eager", anew=True)
        assert [work for work, _ in timed].count("step") == len(SIZES)
    del timed[:]
    with pretending(model, replace(ABOUT, resident_layers=2)):
        measure(model, [], "eager")
        assert len(timed) == len(SIZES), "with more layers in memory a step is another one"
        for file in (tmp_path / "curves").iterdir():
            file.write_text('{"seconds": {"1": 2.0}}')
        measure(model, [], "eager")
        assert len(timed) == 2 * len(SIZES), "a damaged file is none"


def test_where_scores_are_computed_along_the_path_its_tokens_have_times_of_their_own(timed, monkeypatch):
    monkeypatch.setattr(runs, "MOST_SCORES", 4 * 61 * 100)  # bytes of a hundred nodes
    model = tiny_llama()
    with pretending(model):
        assert measure(model, [], "eager").walking == measure(model, [], "eager").walking == 0.25
        assert [work for work, _ in timed].count("walk") == 1, "kept"


@torch.no_grad()
def test_what_a_further_accepted_token_takes_is_its_logits_and_draw(monkeypatch):
    counts, plain = [], LastPart.logits
    monkeypatch.setattr(LastPart, "logits", lambda *inputs: counts.append(inputs[-1].numel()) or plain(*inputs))
    for most, expected in ((0, [2, 1, 1]), (1 << 40, [])):
        del counts[:]
        monkeypatch.setattr(runs, "MOST_SCORES", most)
        model = tiny_llama()
        runner = open_idle(model, "eager", Blank(), bush(32), work="walk")
        model.model.forward = None  # the decoder is not called again
        for _ in range(2):
            runner.run(lambda phase: None)
        assert counts == expected


def test_rules_that_need_the_scores_of_all_nodes_get_no_trees_whose_scores_are_large(timed, monkeypatch):
    monkeypatch.setattr(runs, "MOST_SCORES", 4 * 61 * 100)
    model = tiny_llama()
    with pretending(model):
        drawn = measure(model, [], "eager", draft_sampling("residual", True)).target
        assert list(drawn) == [1, 8, 32, 64, 100] and drawn[100] == pytest.approx(2.0)
        for sampling in (draft_sampling("match", True), draft_sampling("residual", False)):
            assert max(measure(model, [], "eager", sampling).target) == 512


def test_a_plan_belongs_to_how_weights_are_streamed():
    model, drafter, paths = tiny_llama(), paceline.load_drafter("ngram", tiny_llama()), set()
    paths.add(plan_path(model, drafter, "eager", "match", 0.0))
    for about in (ABOUT, replace(ABOUT, resident_layers=2), replace(ABOUT, direct=False), replace(ABOUT, kind="host")):
        with pretending(model, about):
            paths.add(plan_path(model, drafter, "eager", "match", 0.0))
    assert len(paths) == 5


@pytest.mark.parametrize("nodes", [2, 8, 32, 100, 512])
def test_the_trees_that_are_timed_are_no_deeper_than_planned_ones(nodes):
    assert len(bush(nodes)) == nodes and bush(nodes).max_depth <= WIDEST.max_depth


@torch.no_grad()
def test_a_step_that_is_timed_forwards_the_target_once(monkeypatch):
    """Also where the scores are so many that they are not computed at once."""
    monkeypatch.setattr(runs, "MOST_SCORES", 0)
    model, forwards = tiny_llama(), []
    runner = open_idle(model, "eager", Blank(), bush(32))
    model.model.layers[0].register_forward_pre_hook(lambda *ignored: forwards.append(1))
    for _ in range(3):
        runner.run(lambda phase: None)
    assert len(forwards) == 3 and runner.engine.target.last_part.agrees


@torch.no_grad()
def test_the_replay_of_the_widest_tree_takes_the_steps_of_decoding_with_smaller_ones(one_thread):
    model = tiny_llama(seed=3)
    drafter = ModelDrafter(noisy_copy(model, 0.08))
    torch.manual_seed(0)
    prompts = [torch.randint(8, 61, (1, length)) for length in (3, 9)]
    measured = Curves({1: 1.0, 512: 1.0}, ({0: 0.0, 16: 0.0},), ({16: {0: 0.0, 16: 0.0}},), "today")
    with pretending(model):
        assert by_text(model, "match", 0.0) and not by_text(model, "residual", 0.7)
        found = calibrated(model, (drafter,), measured, [{"input_ids": ids} for ids in prompts], "match", 0.0, 14)
    (replay,) = found.replays
    assert found.plan.speedup == max(plan.speedup for plan in found.by_nodes) > 1
    steps, forwards = set(), []
    drafter.model.register_forward_pre_hook(lambda *ignored: forwards.append(1))
    for shape in (
        DynamicShape(5, 4, 4), DynamicShape(12, 3, 8), DynamicShape(24, 6, 4),
        DynamicShape(17, 1, 16), DynamicShape(64, 16, 16), DynamicShape(200, 5, 16), WIDEST,
    ):  # fmt: skip
        taken = 0
        del forwards[:]
        for seed, ids in enumerate(prompts):
            options = {"do_sample": False, "max_new_tokens": 14, "return_dict_in_generate": True, "seed": [seed]}
            with pretending(model):  # so that a drafter forwards no more than is of use
                taken += len(paceline.generate(model, ids, drafter=drafter, tree=shape, **options).trace.events)
        tokens, replayed, levels = replay.steps(shape)
        if shape.width == 16:
            assert (tokens, replayed, levels) == (28, taken, len(forwards) - len(prompts)), "each prompt is read once"
        else:
            assert tokens == 28 and taken <= replayed <= taken + 1, "what a narrow tree expands besides is little"
        steps.add(taken)
    assert len(steps) > 2, "trees that all take the same steps prove nothing"


def test_the_nodes_that_a_tree_needs_are_those_of_a_slow_count():
    """Against growing each tree of a random order of scores by its definition."""
    torch.manual_seed(1)
    parents, depths, ranks = [-1], [0], [0]
    for node in range(1, 60):  # a random tree whose nodes stand in the order of their scores
        parents.append(int(torch.randint(0, node, ())))
        depths.append(depths[parents[-1]] + 1)
        ranks.append(parents[:-1].count(parents[-1]) if node else 0)
    deep = 6
    path, node = [], max(range(60), key=lambda node: (depths[node] <= deep, depths[node]))
    while node:
        path.insert(0, node)
        node = parents[node]
    column = [torch.tensor([values]) for values in (parents, depths, ranks)]
    grown = Grown(*column, torch.tensor([path + [-1] * (deep - len(path))]))
    for width, depth in itertools.product((1, 2, 3, 8), range(1, deep + 1)):
        kept, expanded = [0], {0}
        for level in range(1, depth + 1):
            new = [
                n for n in range(60) if depths[n] == level and parents[n] in expanded and ranks[n] < width
            ]  # fmt: skip
            kept, expanded = sorted([*kept, *new]), expanded | set(new[:width])
        slow = [kept.index(n) + 1 if n in kept else None for n in path]
        needed, reached = grown.needed(width)
        assert [count if count < NEVER else None for count in needed[0, depth - 1, : len(path)].tolist()] == slow
        assert int(reached[0, depth - 1]) == (kept.index(new[0]) + 1 if new else NEVER)


def random_replay(positions=40, seed=0):
    """A replay in which paths of random length need more nodes for each level."""
    torch.manual_seed(seed)
    replay = GrownReplay([])
    for width in WIDTHS:
        jumps = torch.randint(1, 60 // width, (positions, 16)).cumsum(1) + 1
        needed = jumps[:, None].expand(-1, 16, -1) + 1000 * torch.ones(16, 16).triu(1).long()
        replay._needed[width] = [(needed, jumps // 2 + 1)]
    return replay


def test_the_dynamic_tree_is_the_best_of_all_that_were_replayed():
    replay = random_replay()
    target = {1: 4.0, 64: 4.0, 128: 5.0, 512: 12.0}
    drafting = {
        1: {0: 0.0, 16: 0.6},
        2: {0: 0.0, 16: 0.7},
        4: {0: 0.0, 16: 0.8},
        8: {0: 0.0, 16: 1.0},
        16: {0: 0.0, 16: 1.6},
    }
    best = {}
    for nodes, depth, width in itertools.product(BUDGETS, range(1, 17), WIDTHS):
        if (shape := shape_of(nodes, depth, width)) is not None:
            tokens, steps, forwards = replay.steps(shape)
            seconds = interpolate(target, nodes) + interpolate(drafting[width], forwards / steps)
            gain = 4.0 * tokens / steps / seconds
            best[nodes] = max(best.get(nodes, 0.0), gain)
    chosen = plans(replay, target, drafting)
    assert [plan.speedup for plan in chosen] == pytest.approx(list(best.values())) and len(chosen) == len(BUDGETS)
    assert [len(plan.shape) for plan in plans(replay, {1: 4.0, 64: 4.0}, drafting)][-1] == 64, "no larger than timed"
    tokens, steps, forwards = replay.steps(chosen[-1].shape)
    walked = replay.plan(chosen[-1].shape, 12.0, {0: 0.0, 16: 0.0}, 4.0, walking=0.5)
    assert walked.seconds_per_step == pytest.approx(12.0 + 0.5 * (tokens / steps - 1)), "the root is in the twelve"
    dear = plans(replay, target, drafting, lambda nodes: 100.0 if nodes > 64 else 0.0)
    assert max(dear, key=lambda plan: plan.speedup).shape.nodes <= 64
    narrow = plans(replay, {1: 1.0, 512: 1.0}, {width: {0: 0.0, 16: 100.0 * (width > 1)} for width in WIDTHS})
    assert narrow[0].shape.width == 1, "chains are among the choices"


def test_plans_of_dynamic_trees_are_files_that_tree_takes(tmp_path):
    plan = Plan.of(DynamicShape(96, 12, 8), 5.0, 6.0, 4.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.speedup == pytest.approx(4 * 5 / 6)
    assert '"tree": "dynamic:96x12x8"' in (tmp_path / "plan.json").read_text()


def test_a_drafter_of_fixed_trees_is_replayed_on_a_broad_one(one_thread):
    model = tiny_llama(seed=3)
    drafter, prompt = paceline.load_drafter("ngram", model), {"input_ids": torch.tensor([[5, 6, 5, 6, 5]])}
    with pretending(model):
        replay = calibrate(model, drafter, [prompt], "match", 0.0, 12)
        assert max(len(event.parents) for event in replay.texts[0]) == 256
        measured = Curves({1: 1.0, 512: 1.0}, ({0: 0.0, 16: 0.0},), ({1: {0: 0.0, 16: 0.0}},))
        found = calibrated(model, (drafter,), measured, [prompt], "match", 0.0, 12)
    assert isinstance(found.plan.shape, TreeShape) and not found.by_nodes and len(found.texts) == 1


def test_of_a_pair_the_first_alone_is_planned_with_its_dynamic_trees(one_thread):
    """Which beside another drafter it does not grow."""
    model = tiny_llama(seed=3)
    parts = ModelDrafter(noisy_copy(model, 0.08)), paceline.load_drafter("ngram", model)
    flat, free = {1: 1.0, 512: 1.0}, {0: 0.0, 16: 0.0}
    measured = Curves(flat, (free, free), (dict.fromkeys(WIDTHS, free), {1: free}))
    prompt = {"input_ids": torch.tensor([[5, 6, 5, 6, 5]])}
    with pretending(model):
        pair = calibrated(model, parts, measured, [prompt], "match", 0.0, 12)
        first = calibrated(model, parts[:1], measured, [prompt], "match", 0.0, 12, pair.texts)
    assert isinstance(pair.plan.shape, TreeShape) and len(pair.rates) == 2
    assert pair.alone[0] == first.plan and isinstance(first.plan.shape, DynamicShape)
    assert isinstance(pair.alone[1].shape, TreeShape)
