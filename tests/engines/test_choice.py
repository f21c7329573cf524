"""Which executor runs, what `auto` falls back to, and which engines are kept."""

from dataclasses import dataclass

import paceline
import pytest
import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import capture_choice, executors, pool, runs

from support.models import tiny_llama
from support.offenders import Offender, host_read
from support.tape import tape_executor


def test_kept_engines_are_few_and_forget_the_last_text(model, drafters, prompts, monkeypatch):
    with tape_executor(monkeypatch) as tapes:
        runs.reset(model)
        monkeypatch.setattr(pool, "KEPT", 4)
        for tree in ("chain:1", "chain:2", "chain:3", "2x1", "2x2", "3x1"):
            truth = paceline.generate(
                model, *prompts[0], drafter="ngram", tree=tree, max_new_tokens=9, executor="eager"
            )
            got = paceline.generate(model, *prompts[0], drafter="ngram", tree=tree, max_new_tokens=9, executor="tape")
            assert torch.equal(got, truth)
        kept = pool.pool_of(model).runs
        assert len(tapes) == 6 and len(kept) == pool.KEPT
        for layer in kept[-1].engine.target.cache.layers:
            layer.keys.fill_(torch.nan)  # as a failed run may leave it
        got = paceline.generate(model, *prompts[0], drafter="ngram", tree="3x1", max_new_tokens=9, executor="tape")
        assert torch.equal(got, truth) and len(tapes) == 6
    runs.reset(model)


def test_auto_falls_back_to_eager_with_a_line(model, prompts, monkeypatch, capsys):
    """A drafter that cannot be traced: "auto" says so and decodes, "compiled" refuses."""

    @dataclass(frozen=True)
    class Untraceable(NgramDrafter):
        def open(self, request):
            session = Offender(self, request)
            session.offence = host_read
            return session

    runs.reset(model)
    truth = paceline.generate(model, *prompts[0], drafter="ngram", max_new_tokens=9, executor="eager")
    monkeypatch.setattr(executors, "LONG_RUN", 1)
    monkeypatch.setattr(runs, "patience", lambda key, kinds: 0.0)
    got = paceline.generate(model, *prompts[0], drafter=Untraceable(), max_new_tokens=9, executor="auto")
    assert torch.equal(got, truth)
    assert "use executor='eager' (which runs now)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="executor='compiled' cannot take this step") as caught:
        paceline.generate(model, *prompts[0], drafter=Untraceable(), max_new_tokens=9, executor="compiled")
    assert "\n" not in str(caught.value)
    runs.reset(model)


def test_a_model_that_changes_gets_new_engines(prompts, monkeypatch):
    """Kept engines hold buffers of the model's dtype."""
    model = tiny_llama(seed=2)
    with tape_executor(monkeypatch) as tapes:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            truth = paceline.generate(model, *prompts[0], drafter="ngram", max_new_tokens=9, executor="eager")
            got = paceline.generate(model, *prompts[0], drafter="ngram", max_new_tokens=9, executor="tape")
            assert torch.equal(got, truth)
    assert len(tapes) == 2


def test_the_executor_is_chosen_by_what_can_run(monkeypatch, tmp_path):
    class On:
        """A model of which the device is all that matters."""

        def __init__(self, device):
            self.device = torch.device(device)

    cpu, gpu = On("cpu"), On("cuda")
    choose = executors.choose
    assert choose("auto", cpu, 64, True, False) == "eager"
    assert choose("auto", cpu, 64, True, True) == "compiled"
    assert choose("auto", cpu, 8192, True, False) == "compiled"
    assert choose("auto", cpu, 64, True, False, paying=64.0) == "compiled", "where times are known they decide"
    assert choose("auto", cpu, 8192, True, False, paying=float("inf")) == "eager"
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    for name in ("auto", "cuda_graph"):  # the captured eager step until a check has shown the other to be better
        assert choose(name, gpu, 64, True, False) == "cuda_graph_eager"
    capture_choice.keep_verdict(gpu.device, compiled_is_better=True)
    for name in ("auto", "cuda_graph"):
        assert choose(name, gpu, 64, True, False) == "cuda_graph_compiled"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another card")
    assert choose("auto", gpu, 64, True, False) == "cuda_graph_eager"
    capture_choice.verdict_path(gpu.device).write_text("[")
    assert choose("auto", gpu, 64, True, False) == "cuda_graph_eager", "what cannot be read is no verdict"
    capture_choice.keep_verdict(gpu.device, compiled_is_better=False)
    for name in ("cuda_graph_eager", "cuda_graph_compiled"):
        assert choose(name, gpu, 64, True, False) == name
    assert choose("auto", gpu, 64, False, False) == "eager"
    with pytest.raises(ValueError, match="use 'compiled' or 'eager'"):
        choose("cuda_graph", cpu, 64, True, False)
    with pytest.raises(ValueError, match="use 'eager'"):
        choose("compiled", cpu, 64, False, False)
    monkeypatch.setattr(executors.shutil, "which", lambda name: None)
    assert choose("auto", cpu, 8192, True, False) == "eager"
    with pytest.raises(ValueError, match=r"compiler .* use 'eager'"):
        choose("compiled", cpu, 64, True, False)
