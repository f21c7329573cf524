"""The table of kinds: a line in it is all that loading, training and judging need to know of a family."""

import ast
import inspect
import json

import paceline
import pytest
import torch
from paceline.drafters.eagle.folder import save_network
from paceline.drafters.kinds import KINDS, Kind
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.proposal import DrafterTraits, NoDrafter, is_drafter
from paceline.training.objectives.objective import Objective
from paceline.training.ranks import judge_of
from paceline.training.train import objective_of

from support.models import fitted_heads, noisy_copy, random_eagle


class ToyDrafter(NgramDrafter):
    """Says what it was loaded with."""

    traits = DrafterTraits(follows_any_tree=True, kind="toy")

    @classmethod
    def load(cls, source, folder, target):
        return cls(longest=folder.config["longest"])


class ToyObjective(Objective):
    @classmethod
    def judge(cls, drafter, model, depths):
        return cls, drafter, model, depths


def test_a_line_makes_a_kind(target, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"paceline_drafter": "toy", "longest": 3}))
    with pytest.raises(ValueError, match="of a kind 'toy' and this version knows medusa, draft_lm, eagle; upgrade"):
        paceline.load_drafter(tmp_path, target)
    with pytest.raises(ValueError, match=r"objective\.kind is 'toy'; known are draft_lm, eagle, medusa$"):
        objective_of({"kind": "toy"})
    assert judge_of(ToyDrafter(), target, 4) is None
    monkeypatch.setitem(KINDS, "toy", Kind(f"{__name__}:ToyDrafter", f"{__name__}:ToyObjective"))
    drafter = paceline.load_drafter(tmp_path, target)
    assert type(drafter).__name__ == "ToyDrafter" and drafter.longest == 3
    found = objective_of({"kind": "toy"})
    assert found.__name__ == "ToyObjective" and judge_of(drafter, target, 4) == (found, drafter, target, 4)


def test_what_cannot_be_trained_is_not_suggested(target):
    with pytest.raises(ValueError, match=r"objective\.kind is 'ngram'; known are draft_lm, eagle, medusa$"):
        objective_of({"kind": "ngram"})
    assert judge_of(NgramDrafter(), target, 4) is None and judge_of(NoDrafter(), target, 4) is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_what_the_table_promises(target, tmp_path, kind):
    """A drafter that is loaded says which kind it is, and whether it can grow trees; all can stand beside another."""
    if kind == "medusa":
        fitted_heads(target, "markov", steps=0).save(tmp_path)
    elif kind == "draft_lm":
        noisy_copy(target).save_pretrained(tmp_path)
    elif kind == "eagle":
        save_network(random_eagle(target), tmp_path)
    generator = torch.get_rng_state()
    drafter = paceline.load_drafter(tmp_path if KINDS[kind].weights else kind, target)
    assert torch.equal(torch.get_rng_state(), generator), "a sampled text is the same behind it"
    assert type(drafter) is KINDS[kind].drafter_class() and is_drafter(drafter)
    traits = drafter.traits
    assert (traits.kind, traits.fills_dynamic, traits.follows_any_tree) == (kind, KINDS[kind].fills_dynamic, True)
    if KINDS[kind].objective is None:
        return
    objective = KINDS[kind].objective_class()
    assert issubclass(objective, Objective) and not inspect.isabstract(objective)
    batch = {"input_ids": torch.arange(1, 9)[None], "loss_mask": torch.ones(1, 8, dtype=torch.int64)}
    batch |= {"document": torch.zeros(1, 8, dtype=torch.int64), "position_ids": torch.arange(8)[None]}
    ranks, judged = judge_of(drafter, target, 2)(batch)
    assert len(ranks) == judged.sum() > 0


def test_kinds_are_named_in_the_table_and_their_own_files_only(root):
    """But for `untrained`, whose names are what `paceline check` calls its drafters."""
    named = {name for kind in KINDS.values() for name in (kind.drafter, kind.objective) if name is not None}
    own = {f"{name.partition(':')[0].split('.')[-1]}.py" for name in named} | {"kinds.py", "untrained.py"}
    for path in (*root.glob("drafters/*.py"), *root.glob("training/**/*.py")):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert path.name in own or not words & KINDS.keys(), (path, words & KINDS.keys())
