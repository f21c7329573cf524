"""The captured step by tape: every pair of drafter and rule is recorded once and then decodes other prompts.

The text must be the eager executor's. Planted offenders must be caught, by name or by wrong tokens.
"""

from dataclasses import dataclass

import paceline
import pytest
import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs

from support.offenders import OFFENDERS, Offender, boolean_index, dynamic_shape
from support.steps import PAIRS, decode
from support.tape import tape_executor


@pytest.mark.parametrize(("which", "rule", "way"), PAIRS)
def test_a_recorded_step_decodes_other_prompts(model, drafters, prompts, monkeypatch, which, rule, way):
    with tape_executor(monkeypatch) as tapes:
        runs.reset(model)
        for seed, batch in enumerate(prompts):
            truth = decode(model, drafters[which], rule, way, batch, "eager", seed)
            got = decode(model, drafters[which], rule, way, batch, "tape", seed)
            assert torch.equal(got, truth)
    (tape,) = tapes  # one recording for all prompts
    assert tape.tape.offences == []
    assert tape.replays > 10
    runs.reset(model)


@pytest.mark.parametrize("offence", OFFENDERS, ids=lambda function: function.__name__)
def test_planted_offenders_are_caught(model, monkeypatch, offence):
    @dataclass(frozen=True)
    class Planted(NgramDrafter):
        def open(self, request):
            session = Offender(self, request)
            session.offence = offence
            return session

    cycle = torch.arange(5, 11).repeat(4)[None]  # prompt lookup is right here, so that drafts matter
    options = dict(drafter=Planted(), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    options |= dict(logits_processor=[], suppress_tokens=[t for t in range(61) if t not in range(5, 11)])
    with tape_executor(monkeypatch) as tapes:
        runs.reset(model)
        eager = paceline.generate(model, cycle, executor="eager", **options)
        try:
            taped = paceline.generate(model, cycle, executor="tape", **options)
        except AssertionError as changed:  # a shape that follows data can also end the replay
            assert "changed its shape" in str(changed) and offence in (dynamic_shape, boolean_index)
    named = tapes[0].tape.offences
    if OFFENDERS[offence] is not None:
        assert any(OFFENDERS[offence] in name for name in named), named
    else:
        assert named == []
        drafted = [[event.tokens[1:] for event in out.trace.events] for out in (eager, taped)]
        assert drafted[0] != drafted[1], "the replayed step drafts something else"
    runs.reset(model)
