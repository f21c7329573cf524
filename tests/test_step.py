"""The captured step: by tape, by fullgraph compilation, by inductor, and on CUDA where there is one.

Every pair of drafter and rule is recorded or compiled once and then decodes other prompts; the text must be
the eager executor's. Planted offenders must be caught, by name or by wrong tokens.
"""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass

import paceline
import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter, NgramSession
from paceline.spec.engines import captures, executors, pool, runs
from paceline.spec.kernels.cpu import is_x86
from paceline.spec.proposal import NoDrafter
from paceline.spec.step import step
from tape import tape_executor

from conftest import fitted_heads, noisy_copy, tiny_llama

WAYS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=12, suppress_tokens=[3, 4]),
}
DRAFTERS = ["none", "ngram", "model", "independent", "markov", "hydra", "beside"]
LINEARS = 15  # of the target: seven in each layer, and the LM head
PAIRS = [
    pair for pair in itertools.product(DRAFTERS, ["match", "residual", "typical"], WAYS)
    if pair != ("ngram", "residual", "sampled")
]  # fmt: skip
COMPILED = [
    ("none", "match", "greedy"), ("ngram", "match", "greedy"), ("beside", "match", "greedy"),
    ("model", "residual", "sampled"), ("independent", "match", "greedy"), ("hydra", "match", "sampled"),
    ("markov", "residual", "sampled"),
]  # fmt: skip
# Every drafter under every rule, if not in every way: tracing takes seconds.
TRACED = [pair for pair in PAIRS[::2] if not any(pair[:2] == other[:2] for other in COMPILED)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=2)


@pytest.fixture(scope="module")
def drafters(model):
    made = {"none": NoDrafter(), "ngram": NgramDrafter(), "model": ModelDrafter(noisy_copy(model))}
    for mode in ("independent", "markov", "hydra"):
        made[mode] = MedusaDrafter(fitted_heads(model, mode, known=40))
    made["beside"] = Beside(made["hydra"], made["ngram"])
    return made


@pytest.fixture(scope="module")
def prompts():
    """Three batches of two ragged rows."""
    torch.manual_seed(5)
    batches = []
    for width, pad in ((9, 3), (6, 0), (14, 9)):
        ids, mask = torch.randint(5, 61, (2, width)), torch.ones(2, width, dtype=torch.long)
        ids[0, width // 2 :] = ids[0, : width - width // 2].clone()
        mask[1, :pad] = 0
        batches.append((ids * mask, mask))
    return batches


def decode(model, drafter, rule, way, batch, executor, seed=0):
    options = dict(max_new_tokens=20, eos_token_id=[17, 30], pad_token_id=0, verify=rule, seed=seed)
    return paceline.generate(model, *batch, drafter=drafter, executor=executor, **options, **WAYS[way])


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


class Offender(NgramSession):
    """Prompt lookup that does one thing too many in its step."""

    offence = staticmethod(lambda session, state, tokens: None)
    steps = 0

    def propose(self, state):
        proposal = super().propose(state)
        self.steps += 1
        tokens = self.offence(self, state, proposal.tokens)
        if tokens is not None:
            proposal.tokens.copy_(tokens)
        return proposal


def host_read(session, state, tokens):
    return tokens + (int(state.lengths[0]) < 0)


def silent_host_read(session, state, tokens):
    return tokens + (state.lengths.tolist()[0] < 0)


def branch(session, state, tokens):
    return tokens * 1 if bool(state.done.all()) else None


def host_constant(session, state, tokens):
    return torch.maximum(tokens, torch.tensor([-1]))


def boolean_index(session, state, tokens):
    tokens[tokens < -1] = 0


def dynamic_shape(session, state, tokens):
    return tokens + 0 * len((tokens > 5).nonzero())


def randomness(session, state, tokens):
    return tokens + (torch.rand(1) < 0).long()


def cross_device(session, state, tokens):
    tokens.to("meta")


def baked_count(session, state, tokens):
    """A Python number that should have advanced: drafts shift from the third step on."""
    return torch.where(tokens.new_full((), 1) > 0, tokens.roll(session.steps % 3, 1), tokens)


def rebound(session, state, tokens):
    """A buffer replaced where it should have been written."""
    session.kept = getattr(session, "kept", torch.zeros_like(tokens)) + 1
    return torch.where(session.kept > 3, tokens, -1)


OFFENDERS = {
    host_read: "host read",
    silent_host_read: "host read",
    branch: "host read",
    host_constant: "host constant",
    boolean_index: "boolean index",
    dynamic_shape: "dynamic shape",
    randomness: "unregistered randomness",
    cross_device: "cross-device",
    baked_count: None,
    rebound: None,
}


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
    own = {"none": 0, "ngram": 0, "model": LINEARS}.get(which, 1)  # that one is the heads' LM head
    assert len(layers) == LINEARS + own
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no recompile between prompts"
    assert "compiling the step" in capfd.readouterr().err
    runs.reset(model)


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
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
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
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    choose = executors.choose
    assert choose("auto", cpu, 64, True, False) == "eager"
    assert choose("auto", cpu, 64, True, True) == "compiled"
    assert choose("auto", cpu, 8192, True, False) == "compiled"
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    for name in ("auto", "cuda_graph"):  # the captured eager step until a check has shown the other to be better
        assert choose(name, gpu, 64, True, False) == "cuda_graph_eager"
    captures.keep_verdict(gpu, compiled_is_better=True)
    for name in ("auto", "cuda_graph"):
        assert choose(name, gpu, 64, True, False) == "cuda_graph_compiled"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another card")
    assert choose("auto", gpu, 64, True, False) == "cuda_graph_eager"
    captures.verdict_path(gpu).write_text("[")
    assert choose("auto", gpu, 64, True, False) == "cuda_graph_eager", "what cannot be read is no verdict"
    captures.keep_verdict(gpu, compiled_is_better=False)
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
