"""Planted faults are named, and the other parts go on."""

import time

import pytest
import torch
from paceline.drafters.untrained import untrained
from paceline.spec import step
from paceline.spec.check import captured, machine
from paceline.spec.check.budget import Clock, run_tasks
from paceline.spec.check.lossless import DRAFTS, Lossless
from paceline.spec.check.record import FAILS, HOLDS, NOT_HERE
from paceline.spec.check.subject import Subject
from paceline.spec.plan import step_times
from paceline.spec.state import DecodeState
from paceline.spec.target.slots import SlotModel
from paceline.spec.verify import Verdict

from support.checks import parts, run
from support.models import tiny_llama
from support.tape import TapeExecutor, tape_executor

pytestmark = pytest.mark.usefixtures("one_thread")


def mask_off_by_one(monkeypatch):
    """Every node sees one slot less of the text than it should."""
    view_of_nodes = SlotModel.view_of_nodes

    def off(self, base, tree, index):
        view = view_of_nodes(self, base, tree, index)
        rows = torch.arange(len(base), device=base.device)
        view.visible[rows, :, base - 1] = False
        return view

    monkeypatch.setattr(SlotModel, "view_of_nodes", off)


def verification_that_ignores_the_text(monkeypatch):
    """Every drafted leaf is accepted."""

    def all_accepted(rule, scores, proposal, keys, base, sampling):
        deepest = proposal.tree.depths.expand_as(proposal.tokens).argmax(-1)
        best, draws = scores.max(-1)
        pick = deepest[:, None]
        return Verdict.at(deepest, draws.gather(1, pick)[:, 0], best.gather(1, pick)[:, 0], proposal)

    monkeypatch.setattr(step, "verify", all_accepted)


def broken_probe(monkeypatch):
    def broken(subject):
        raise RuntimeError("the probe is broken\nand says more")

    monkeypatch.setattr(machine, "_bandwidth", broken)


def executor_that_fails_while_timed(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(step_times, "_forward_alone", broken)


def heads_that_learn_nan(monkeypatch):
    monkeypatch.setattr("paceline.training.objectives.heads.MedusaObjective.forward", _nan_losses)


def _nan_losses(self, batch, seen):
    from paceline.training.objectives.objective import Losses

    counts = torch.zeros(self.depths, dtype=torch.int64)
    total = sum(parameter.sum() for parameter in self.parameters()) * torch.nan
    return Losses(total, batch["loss_mask"].sum(), counts, counts)


def planner_that_fails(monkeypatch):
    monkeypatch.setattr("paceline.spec.check.worth.choose_tree", lambda *args: 1 / 0)


FAULTS = {
    mask_off_by_one: ("lossless", "self-test of the target", "does not follow the positions and masks", 1),
    verification_that_ignores_the_text: ("lossless", "ngram tree", "leaves the text of plain decoding at token", 1),
    broken_probe: ("machine", "memory read", "RuntimeError: the probe is broken", 0),
    executor_that_fails_while_timed: ("steps", "eager", "RuntimeError: no such kernel", 0),
    planner_that_fails: ("worth", "any", "ZeroDivisionError", 0),
    heads_that_learn_nan: ("training", "10 steps of heads", "loss", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named_and_the_other_parts_go_on(folder, tmp_path, monkeypatch, short, fault):
    part, label, words, code = FAULTS[fault]
    fault(monkeypatch)
    got, check = run(folder, tmp_path)
    found = parts(check)
    failing = [f for f in found[part]["findings"] if f["verdict"] == FAILS]
    assert got == code and found[part]["verdict"] == FAILS
    named = " ".join(str(value) for value in failing[0]["what"].values())
    assert words in failing[0]["reason"] and (label in named or label == "any"), failing[0]
    others = {name for name in found if name != part and found[name]["verdict"] == FAILS}
    both = {"steps"} if fault is mask_off_by_one else set()  # no draft model can be made to be timed either
    assert others == both, "a fault of one part is not laid to another"
    assert all(found[name]["findings"] for name in found), "the other parts go on"
    assert check["sentence"].startswith("NOT every promise holds here") == (part == "lossless")


def subject_of(model, executors):
    return Subject("tiny", model, executors, untrained)


@pytest.mark.slow
def test_a_captured_step_is_checked_and_a_stale_buffer_is_named(monkeypatch):
    """By tape: first as it is; then with a state that is rebound where it should be written."""

    def lossless():
        subject = subject_of(tiny_llama(vocab=97), ["tape"])
        clock = Clock(300, time.perf_counter())
        return list(run_tasks(Lossless(subject, clock).tasks(), clock))

    monkeypatch.setattr("paceline.spec.check.lossless.MOST_TOKENS", 8)
    with tape_executor(monkeypatch):
        sound = lossless()
        verdicts = {(f.what["promise"], f.verdict) for f in sound}
        assert (f"one capture for {captured.PROMPTS} prompts, read one step late", HOLDS) in verdicts
        assert ("a replayed step never waits", NOT_HERE) in verdicts and FAILS not in {v for _, v in verdicts}
        assert sum(f.what["promise"] == "same text" for f in sound) == 4 * (len(DRAFTS) + 1)
        admit = DecodeState.admit

        def rebinding(self, *args):
            admit(self, *args)
            self.lengths = self.lengths.clone()

        monkeypatch.setattr(DecodeState, "admit", rebinding)
        stale = lossless()
        failing = [f for f in stale if f.verdict == FAILS]
        assert failing and {f.what["executor"] for f in failing} == {"tape"}
        assert {f.verdict for f in stale if f.what.get("executor") is None} == {HOLDS}, "the target itself is sound"
    TapeExecutor.made.clear()
