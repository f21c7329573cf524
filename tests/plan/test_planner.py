"""The planner: the heap against Sequoia's dynamic programme, counts against hand-made traces, choices
against brute force, and predictions against decoding."""

import itertools
import random
import time
from functools import partial

import paceline
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import cli
from paceline.spec.plan import curves
from paceline.spec.plan.store import plan_path
from paceline.spec.plan.trees import (
    Acceptance,
    Plan,
    best_tree,
    choose_tree,
    expected_tokens,
    grow,
    interpolate,
    non_increasing,
)
from paceline.spec.trace import Event
from paceline.spec.tree import TreeShape

from support.models import noisy_copy, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


def dynamic_programme(rates, nodes, depth):
    """Most expected tokens of a tree of at most `nodes` nodes and `depth` levels (Sequoia, section 3.1, with p by
    depth): forest[d][r][m] is the best of m nodes under one parent at depth d, children of rank r on."""
    levels = min(depth, len(rates))
    below = [[0.0] * nodes for _ in range(levels + 1)]  # [d][m]: m nodes below a node at depth d
    for level in reversed(range(levels)):
        best = [0.0] * nodes  # no child of rank >= r
        for p in reversed(rates[level]):
            row = [0.0] * nodes
            for count in range(1, nodes):
                row[count] = max(
                    [row[count - 1]] + [p * (1 + below[level + 1][own]) + best[count - 1 - own] for own in range(count)]
                )
            best = row
        below[level] = best
    return 1 + below[0][nodes - 1]


def random_rates(rng, depths=5, ranks=5):
    rates = []
    for _ in range(rng.randint(1, depths)):
        raw = sorted((rng.random() for _ in range(rng.randint(1, ranks))), reverse=True)
        total = sum(raw) / rng.uniform(0.3, 1.0)
        rates.append([value / total for value in raw])
    return rates


def test_the_heap_equals_the_dynamic_programme_on_a_thousand_profiles():
    rng = random.Random(3)
    for _ in range(1000):
        rates, nodes, depth = random_rates(rng), rng.randint(1, 14), rng.randint(0, 6)
        shape, expected = best_tree(rates, nodes, depth)
        assert abs(expected - dynamic_programme(rates, nodes, depth)) < 1e-12
        assert len(shape) <= nodes and shape.max_depth <= depth
        assert abs(expected_tokens(rates, shape) - expected) < 1e-12


def test_every_prefix_of_the_growth_is_the_best_tree_of_its_size():
    rng = random.Random(4)
    for _ in range(50):
        rates = random_rates(rng)
        parents, expected = grow(rates, 12, 4)
        for size in range(1, len(parents) + 1):
            assert abs(expected[size - 1] - dynamic_programme(rates, size, 4)) < 1e-12
            assert abs(expected_tokens(rates, TreeShape(tuple(parents[:size]))) - expected[size - 1]) < 1e-12


def test_planning_128_nodes_is_quick():
    rates = [[0.6 / (rank + 1) ** 1.5 for rank in range(16)] for _ in range(12)]
    runs = []
    for _ in range(5):
        started = time.perf_counter()
        shape, _ = best_tree(rates, 128, 12)
        runs.append(time.perf_counter() - started)
    assert len(shape) == 128 and shape.max_depth <= 12
    print(f"planning 128 nodes: {min(runs) * 1000:.2f} ms")  # a number to look at, not to assert


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=8))
def test_isotonic_regression_is_the_closest_non_increasing_sequence(pairs):
    values, weights = zip(*pairs)
    fitted = non_increasing(list(values), list(weights))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fitted))

    def cost(candidate):
        return sum(w * (a - b) ** 2 for a, b, w in zip(values, candidate, weights))

    rng = random.Random(0)
    for _ in range(30):  # no non-increasing neighbour is closer
        other = sorted((value + rng.gauss(0, 0.05) for value in fitted), reverse=True)
        assert cost(other) >= cost(fitted) - 1e-9
    assert abs(sum(w * (a - b) for a, b, w in zip(values, fitted, weights))) < 1e-6


def test_acceptance_is_counted_as_by_hand():
    parents = [-1, 0, 0, 1, 1]
    events = [
        Event(0, 0, [9, 1, 2, 3, 4], parents, [1, 4], 7),  # rank 0, then rank 1
        Event(0, 1, [9, 1, 2, 3, 4], parents, [2], 7),  # rank 1, a leaf
        Event(0, 2, [9, 1, -1, 3, 4], parents, [], 7),  # nothing; an empty node is a miss
        Event(0, 3, [9, 1, 2, 3, 4], parents, [1], None),  # ended at node 1: its children were not examined
    ]
    counted = Acceptance.of(events)
    assert counted.hits == [[2, 1], [0, 1]]
    assert counted.trials == [[4, 4], [1, 1]]
    assert Acceptance.of([]).rates() == []


def test_rates_are_smooth_and_lean_on_the_depth_above():
    rates = Acceptance([[60, 10, 12], [1, 1]], [[100, 100, 100], [2, 1]]).rates(weight=20)
    assert rates[0] == [0.6, 0.11, 0.11]
    assert rates[1][0] == pytest.approx((1 + 20 * 0.6) / 22)
    assert rates[1][1] == pytest.approx((1 + 20 * 0.11) / 21)


def test_the_choice_is_the_best_of_all_trees():
    """Against every tree of up to six nodes."""
    rng = random.Random(1)
    shapes = {
        TreeShape((-1, *rest)) for size in range(6) for rest in itertools.product(*[range(n + 1) for n in range(size)])
    }
    for _ in range(40):
        rates = random_rates(rng, depths=4, ranks=4)
        target = {1: 1.0, 2: rng.uniform(1, 1.3), 4: rng.uniform(1.3, 1.6), 6: rng.uniform(1.6, 2.5)}
        draft = {0: 0.0, 4: rng.uniform(0, 2)}
        plan = choose_tree(rates, target, draft)

        def seconds(shape, rates=rates, target=target, draft=draft):
            cost = interpolate(target, len(shape)) + interpolate(draft, shape.max_depth)
            return cost / expected_tokens(rates, shape)

        best = min(seconds(shape) for shape in shapes if shape.max_depth <= 4)
        assert plan.seconds_per_step / plan.tokens_per_step == pytest.approx(best)
        assert plan.speedup == pytest.approx(1.0 / best)
        assert expected_tokens(rates, plan.shape) == pytest.approx(plan.tokens_per_step)


def test_a_useless_drafter_is_not_used():
    assert choose_tree([[0.01, 0.0]], {1: 1.0, 8: 1.5}, {0: 0.0, 2: 0.2}).shape.parents == (-1,)
    assert choose_tree([], {1: 1.0, 8: 1.5}, {0: 0.0, 2: 0.2}).shape.parents == (-1,)


def test_plans_are_files_that_tree_takes(target, ragged, tmp_path):
    plan = choose_tree([[0.7, 0.2], [0.6, 0.1]], {1: 1.0, 8: 1.2}, {0: 0.0, 2: 0.1})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    out = paceline.generate(
        target,
        *ragged,
        drafter="ngram",
        tree=str(tmp_path / "plan.json"),
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert tuple(out.trace.events[0].parents) == plan.shape.parents
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ValueError, match="make one with paceline plan"):
            paceline.generate(target, *ragged, drafter="ngram", tree=str(tmp_path / name), max_new_tokens=3)


def test_predicted_tokens_per_step_come_true(target, draft):
    """Counted on half of the prompts, predicted for a planned tree, decoded on the other half."""

    torch.manual_seed(0)
    prompts = torch.randint(1, 61, (24, 8))
    options = dict(drafter=draft, do_sample=True, top_k=0, max_new_tokens=60, return_dict_in_generate=True)
    calibration = paceline.generate(target, prompts[:12], tree="4x3x2x1", seed=1, **options)
    rates = Acceptance.of(calibration.trace.events).rates()
    shape, expected = best_tree(rates, 12, 4)
    measured = paceline.generate(target, prompts[12:], tree=shape, seed=2, **options).trace.summary()["tokens_per_step"]
    assert measured == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_plan_and_profile_from_the_command_line(tmp_path, monkeypatch, capsys, tokenizer):
    """Calibrate, measure and plan a tiny pair, then decode with the kept plan and with the file."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(curves, "alone", partial(curves.alone, repeats=3, warm_up=1))
    model = tiny_llama(max_position_embeddings=512)
    for name, weights in (("target", model), ("draft", noisy_copy(model))):
        weights.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["ABCABCABC"]}\n{"prompt": "XYZXYZ"}\n')
    pair = ["--model", str(tmp_path / "target"), "--drafter", str(tmp_path / "draft")]
    command = ["plan", *pair, "--calibrate", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "20"]
    decode = ["generate", *pair, "--prompt", "ABC", "--max-new-tokens", "12", "--json", "--tree"]
    assert cli.main([*decode, "auto"]) == 2
    assert "make one with paceline plan" in capsys.readouterr().err
    assert cli.main([*command, "-o", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert "step ms" in printed and "p: depth" in printed and "tokens per step expected" in printed
    assert "ms predicted" in printed and "ms measured" in printed
    assert Plan.load(tmp_path / "plan.json").plain_seconds > 0
    texts = []
    for tree in ("auto", str(tmp_path / "plan.json"), "chain:2"):
        assert cli.main([*decode, tree]) == 0
        texts.append(capsys.readouterr().out.split('"tokens"')[0])
    assert texts[0] == texts[1] == texts[2]
    assert cli.main(["profile", *pair]) == 0
    printed = capsys.readouterr().out
    assert (
        "an eager step of 5 nodes" in printed
        and "ms by these tables" in printed
        and "writing the trace of a row takes" in printed
    )
    coarse = ["--draft-weights", "q4"]
    assert cli.main([*decode, "auto", *coarse]) == 2, "a plan belongs to the weights"
    capsys.readouterr()
    assert cli.main([*command, *coarse]) == 0
    printed = capsys.readouterr().out
    assert "p of its first guess" in printed and "draft in q4" in printed and "with weights in 16 bits" in printed
    assert cli.main([*decode, "auto", *coarse]) == 0
    assert capsys.readouterr().out.split('"tokens"')[0] == texts[0]
    for rule in ("match", "residual"):  # p and the cost of a step belong to a rule and a temperature
        assert cli.main([*command, "--temperature", "0.8", "--verify", rule]) == 0
        assert cli.main([*decode, "auto", "--temperature", "0.8", "--verify", rule]) == 0
    capsys.readouterr()
    draft, run = str(tmp_path / "draft"), str(tmp_path / "run.jsonl")
    measure = ["bench", str(tmp_path / "prompts.jsonl"), "--model", str(tmp_path / "target"), "-o", run]
    assert cli.main([*measure, "--methods", f"{draft}:tree=4x2x1", "--max-new-tokens", "20"]) == 0
    assert cli.main(["plan", *pair, "--from", run]) == 0
    assert "tokens per step expected" in capsys.readouterr().out
    assert cli.main(["plan", *pair, "--from", run, *coarse]) == 2
    assert "by --calibrate" in capsys.readouterr().err
    assert cli.main(["plan", *pair, "--from", run, "--temperature", "0.3"]) == 2
    assert "holds no measurement" in capsys.readouterr().err
    assert cli.main(["plan", "--model", draft, "--drafter", draft, "--from", run]) == 2
    assert "measured on another model" in capsys.readouterr().err
    for bad, words in (
        ("missing.jsonl", "does not exist; give a file"),
        ("target/config.json", "it is of no known form"),
    ):
        assert cli.main([*command[:-4], "--calibrate", str(tmp_path / bad), "--max-new-tokens", "20"]) == 2
        assert words in capsys.readouterr().err


def test_a_plan_belongs_to_the_weights_of_its_drafter():
    """A draft that was trained again into the same folder has another plan, one that was loaded again the same."""
    model = tiny_llama()
    paths = [plan_path(model, ModelDrafter(noisy_copy(model, seed=seed)), "eager", "match", 0.0) for seed in (1, 1, 2)]
    assert paths[0] == paths[1] != paths[2]
    assert plan_path(model, NgramDrafter(), "eager", "match", 0.0) != plan_path(
        model, NgramDrafter(longest=3), "eager", "match", 0.0
    )
