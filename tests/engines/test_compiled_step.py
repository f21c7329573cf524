"""The compiled step: one graph for every pair of drafter and rule, and the eager executor's text."""

from contextlib import contextmanager

import pytest
import torch
from paceline.spec.engines import pool, runs
from paceline.spec.kernels.cpu import is_x86
from paceline.spec.step import step

from support.steps import PAIRS, decode

pytestmark = pytest.mark.slow

LINEARS = 15  # of the target: seven in each layer, and the LM head
# Without drafter and with prompt lookup alone: kernels/test_packed_weights.py and quantise/test_model.py.
COMPILED = [("eagle beside", "match", "greedy"), ("model", "residual", "sampled"), ("hydra", "match", "sampled")]
# Every drafter under every rule, if not in every way: tracing takes seconds. Heads differ in their network only, so
# that those of one kind, Hydra's, stand for the rules.
TRACED = [
    pair for pair in PAIRS[::2]
    if not any(pair[:2] == other[:2] for other in COMPILED)
    and (pair[0] not in ("independent", "markov") or pair[1] == "match")
]  # fmt: skip


@pytest.mark.parametrize(("which", "rule", "way"), TRACED)
def test_every_step_is_one_graph(model, drafters, prompts, which, rule, way):
    """Fullgraph tracing without a backend: fails on any Python that looks at data, and counts the graphs."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    runs.reset(model)
    decode(model, drafters[which], rule, way, prompts[0], "eager")
    engine = _open(model, drafters[which], rule, way, prompts[0])
    engine.idle_step()
    traced = torch.compile(lambda: step(engine, lambda phase: None), backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        traced(), traced(), traced()
    assert counter.frame_count == 1


def _open(model, drafter, rule, way, batch):
    """The engine that generate() makes for these arguments."""
    opened = []

    @contextmanager
    def noted(*args):
        with runs.open_run(*args) as run:
            opened.append(run.engine)
            yield run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.spec.generate.open_run", noted)
        decode(model, drafter, rule, way, batch, "eager")
    return opened[-1]


@pytest.mark.parametrize(("which", "rule", "way"), COMPILED)
def test_compiled_text_equals_eager_text(model, drafters, prompts, capfd, which, rule, way, tmp_path, monkeypatch):
    runs.reset(model)
    torch._dynamo.utils.counters.clear()
    for seed, batch in enumerate(prompts):
        truth = decode(model, drafters[which], rule, way, batch, "eager", seed)
        assert torch.equal(decode(model, drafters[which], rule, way, batch, "compiled", seed), truth)
    (run,) = pool.pool_of(model).runs
    run.engine.target.model = model  # which an engine at rest does not hold
    layers = [layer for part in run.engine.packable for layer in part.modules() if type(layer) is torch.nn.Linear]
    assert all(hasattr(layer, "packed_weight") for layer in layers) or not is_x86()
    # The EAGLE network has a layer, `fuse` and an LM head; heads have that alone.
    assert len(layers) == LINEARS + {"model": LINEARS, "eagle beside": 9, "hydra": 1}[which]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no recompile between prompts"
    assert "compiling the step" in capfd.readouterr().err
    runs.reset(model)
