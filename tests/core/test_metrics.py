"""Acceptance figures of random traces against the same figures counted another way, and identities between them."""

import math
import re

import paceline
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paceline.spec import metrics
from paceline.spec.plan.trees import Acceptance
from paceline.spec.trace import Event, Trace
from paceline.spec.tree import TreeShape


@st.composite
def events(draw, chain=False, ends=True):
    """Steps over one tree: any node is reached, nodes may be empty, and a text may end inside a step."""
    size = draw(st.integers(1, 8))
    parents = [-1, *((n if chain else draw(st.integers(0, n))) for n in range(size - 1))]
    shape = TreeShape(tuple(parents))
    made = []
    for step in range(draw(st.integers(1, 12))):
        node = draw(st.integers(0, size - 1))
        path = []
        while node > 0:
            path.insert(0, node)
            node = shape.parents[node]
        tokens = [9] + [draw(st.sampled_from([-1, 3])) if n not in path else 4 for n in range(1, size)]
        event = Event(0, step, tokens, list(shape.parents), path, 7, {"draft": 1.0})
        if ends and draw(st.booleans()):
            event.keep(draw(st.integers(1, len(path) + 1)))
        made.append(event)
    return made


def looked_at(event):
    """Nodes whose parent was reached while the text went on, found from the nodes' side."""
    reached = [0, *event.accepted]
    if event.bonus is None:
        reached.remove(reached[-1])
    return [n for n in range(1, len(event.tokens)) if event.parents[n] in reached]


@given(events())
def test_every_figure_equals_another_route(made):
    got, steps = metrics.summary(made), len(made)
    assert got["num_tokens"] == sum(len(e.accepted) + (e.bonus is not None) for e in made)
    assert got["num_draft_tokens"] == sum(len(e.tokens) - 1 - e.tokens.count(-1) for e in made)
    assert got["num_examined_draft_tokens"] == sum(e.tokens[n] != -1 for e in made for n in looked_at(e))
    deepest = max((len(e.accepted) for e in made), default=0)
    for depth in range(1, deepest + 1):
        reached = sum(len(e.accepted) >= depth for e in made)
        assert got["survival"][depth - 1] == reached / steps
        levels = [TreeShape(tuple(e.parents)).depths for e in made]
        offered = sum(any(own[n] == depth for n in looked_at(e)) for e, own in zip(made, levels))
        assert got["conditional"][depth - 1] == pytest.approx(reached / offered)
    assert not any(got["survival"][deepest:])
    hits, trials = metrics.offers(made)
    for depth, row in enumerate(trials):
        for rank, trial in enumerate(row):
            cells = [
                n
                for e in made
                for n in looked_at(e)
                if TreeShape(tuple(e.parents)).depths[n] == depth + 1 and e.parents[:n].count(e.parents[n]) == rank
            ]
            assert trial == len(cells)
    assert sum(map(sum, hits)) == got["num_accepted_draft_tokens"]


@given(events())
def test_identities_between_figures(made):
    got = metrics.summary(made)
    accepted, steps = got["num_accepted_draft_tokens"], got["num_spec_steps"]
    assert sum(got["acceptance_histogram"]) == sum(got["tokens_per_step_histogram"]) == steps
    assert sum(i * n for i, n in enumerate(got["acceptance_histogram"])) == accepted
    assert sum(i * n for i, n in enumerate(got["tokens_per_step_histogram"])) == got["num_tokens"]
    assert sum(got["survival"]) == pytest.approx(accepted / steps) == pytest.approx(got["mean_acceptance_length"] - 1)
    assert got["survival"] == sorted(got["survival"], reverse=True)
    ended = sum(event.bonus is None for event in made)
    assert got["num_tokens"] == accepted + steps - ended
    assert accepted <= got["num_examined_draft_tokens"] <= got["num_draft_tokens"]
    _, use, counted = metrics.node_use(made)
    assert counted == steps == use[0] and sum(use[1:]) == accepted
    counts = Acceptance.of(made)
    assert (counts.hits, counts.trials) == metrics.offers(made)


@given(events(chain=True, ends=False))
def test_in_a_chain_conditional_is_a_ratio_of_survivals(made):
    got = metrics.summary(made)
    before = [1.0, *got["survival"]]
    for depth, conditional in enumerate(got["conditional"]):
        assert conditional == pytest.approx(before[depth + 1] / before[depth])


@given(events(), st.floats(0.1, 1.0))
def test_the_smallest_tree_is_the_smallest(made, share):
    """Against every subset of nodes that is a tree."""
    parents, use, steps = metrics.node_use(made)
    kept = metrics.smallest_tree(parents, use, share)
    wanted = share * (steps + sum(use[1:]))
    assert all(parents[n] in kept for n in kept if n) and sum(use[n] for n in kept) >= wanted
    for subset in range(2 ** len(parents)):
        nodes = {n for n in range(len(parents)) if subset >> n & 1}
        if all(parents[n] in nodes for n in nodes if n) and 0 in nodes and sum(use[n] for n in nodes) >= wanted:
            assert len(kept) <= len(nodes)


def test_a_tree_that_changes_at_every_step_has_no_node_use():
    made = [Event(0, n, [1, 2, 3, 4], [-1, 0, *parents], [], 7) for n, parents in enumerate([(0, 0), (0, 1), (1, 1)])]
    assert metrics.node_use(made) is None and metrics.node_use([]) is None


def test_rates_without_a_denominator_are_none():
    plain = metrics.summary([Event(0, 0, [9], [-1], [], 7)])
    assert plain["draft_acceptance_rate"] is None and plain["examined_acceptance_rate"] is None
    assert plain["survival"] == plain["conditional"] == [] and plain["tokens_per_step"] == 1


def test_prometheus_text_has_the_summary_s_names_and_numbers(target, ragged):
    out = paceline.generate(target, *ragged, drafter="ngram", max_new_tokens=12, return_dict_in_generate=True)
    text, figures = out.trace.prometheus(model='my "model"\n'), out.trace.summary()
    read = dict(re.findall(r"^paceline_(.+) (\S+)$", text, re.M))
    mark = r'{model="my \"model\"\n"'
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            assert float(read.pop(next(k for k in read if k.startswith(name + "{model")))) == value
    assert f"paceline_num_spec_steps{mark}}} {figures['num_spec_steps']}" in text
    assert f'paceline_seconds{mark},phase="draft"}} {figures["seconds"]["draft"]}' in text
    for name, label, first in (("survival", "depth", 1), ("tokens_per_step_histogram", "tokens", 0)):
        for index, value in enumerate(figures[name], first):
            assert f'paceline_{name}{mark},{label}="{index}"}} {value}\n' in text
    assert metrics.prometheus(Trace().summary()).count("num_") == 10, "zeros are told, undefined rates are not"
    assert not math.isnan(float(text.split()[-1]))
