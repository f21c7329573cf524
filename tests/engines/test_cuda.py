"""Captured steps on CUDA; every test that a tape can stand in for a capture in runs by tape on any machine too.

`executor` is a tape on the CPU, and on CUDA the captured eager step, the captured compiled step and the compiled one.
All of them are held against eager steps on the same device.
"""

import itertools

import paceline
import pytest
import torch
from paceline.drafters.beside import Beside
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec import cli
from paceline.spec.check.captured import STEPS, captured_tasks
from paceline.spec.check.record import HOLDS
from paceline.spec.check.subject import Subject
from paceline.spec.engines import executors, pool, runs
from paceline.spec.proposal import NoDrafter
from paceline.spec.serve.texts import Text, decode_texts

from support.models import eagle_copy, fitted_heads, noisy_copy, tiny_llama
from support.tape import tape_executor

# torch warns of settings of the GPU.
pytestmark = pytest.mark.filterwarnings("default::UserWarning:torch")
CUDA = torch.cuda.is_available()
cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
CAPTURED = ["cuda_graph_eager", "cuda_graph_compiled"]
WAYS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=12, suppress_tokens=[3, 4]),
}
DRAFTERS = ["none", "ngram", "model", "independent", "markov", "hydra", "beside"]
RULES = ["match", "residual", "typical"]
EAGLES = [("eagle", "match", "greedy"), ("eagle", "residual", "sampled"), ("eagle beside", "match", "sampled")]
PAIRS = [pair for pair in itertools.product(DRAFTERS, RULES, WAYS) if pair != ("ngram", "residual", "sampled")] + EAGLES
COMPILED_PAIRS = [  # compiling takes seconds a pair
    ("none", "match", "greedy"), ("ngram", "match", "sampled"), ("model", "residual", "sampled"),
    ("eagle beside", "match", "greedy"), ("hydra", "typical", "sampled"), ("markov", "residual", "sampled"),
]  # fmt: skip
ENDS = [17, 30]


@pytest.fixture(params=["tape", *(pytest.param(name, marks=cuda) for name in CAPTURED)])
def executor(request, monkeypatch):
    """The name of an executor that captures; a tape is read one step late too."""
    runs.reset(made("cuda" if CUDA and request.param != "tape" else "cpu"))
    if request.param != "tape":
        yield request.param
        return
    with tape_executor(monkeypatch):
        monkeypatch.setattr(executors.EXECUTORS["tape"], "lag", 1, raising=False)
        yield "tape"


def device_of(executor):
    return "cpu" if executor == "tape" else "cuda"


_models: dict = {}


def made(device, dtype=torch.float32):
    """The target on a device, made once."""
    if (device, dtype) not in _models:
        _models[device, dtype] = tiny_llama(seed=2).to(device, dtype)
    return _models[device, dtype]


def drafter_of(which, model):
    simple = {"none": NoDrafter, "ngram": NgramDrafter, "eagle": lambda: EagleDrafter(eagle_copy(model))}
    if which in simple:
        return simple[which]()
    whole = tiny_llama(seed=2)
    if which == "model":
        return ModelDrafter(noisy_copy(whole).to(model.device, model.dtype))
    if "beside" in which:
        return Beside(drafter_of("eagle" if "eagle" in which else "hydra", model), NgramDrafter())
    return MedusaDrafter(fitted_heads(whole, which, known=40).to(model.device, model.dtype))


def prompts(device):
    """Three batches of two ragged rows."""
    torch.manual_seed(5)
    batches = []
    for width, pad in ((9, 3), (6, 0), (14, 9)):
        ids, mask = torch.randint(5, 61, (2, width)), torch.ones(2, width, dtype=torch.long)
        ids[0, width // 2 :] = ids[0, : width - width // 2].clone()
        mask[1, :pad] = 0
        batches.append(((ids * mask).to(device), mask.to(device)))
    return batches


def decode(model, drafter, executor, batch, seed=0, rule="match", way="greedy", **options):
    options = dict(max_new_tokens=20, eos_token_id=ENDS, pad_token_id=0, verify=rule, seed=seed) | options
    return paceline.generate(model, *batch, drafter=drafter, executor=executor, **options, **WAYS[way])


def assert_same_texts(model, drafter, executor, **options):
    for seed, batch in enumerate(prompts(model.device)):
        truth = decode(model, drafter, "eager", batch, seed, **options)
        assert torch.equal(decode(model, drafter, executor, batch, seed, **options), truth)


def captures_of(model):
    return pool.pool_of(model).runs


@cuda
@pytest.mark.parametrize(("which", "rule", "way"), PAIRS)
def test_a_captured_eager_step_decodes_other_prompts(which, rule, way):
    model = made("cuda")
    runs.reset(model)
    assert_same_texts(model, drafter_of(which, model), "cuda_graph_eager", rule=rule, way=way)
    assert len(captures_of(model)) == 1


@cuda
@pytest.mark.parametrize("name", ["compiled", "cuda_graph_compiled"])
@pytest.mark.parametrize(("which", "rule", "way"), COMPILED_PAIRS)
def test_a_compiled_step_on_cuda_decodes_other_prompts(which, rule, way, name):
    model = made("cuda")
    runs.reset(model)
    assert_same_texts(model, drafter_of(which, model), name, rule=rule, way=way)
    assert len(captures_of(model)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_replayed_as_it_is_run(executor, dtype):
    if executor == "cuda_graph_compiled":
        pytest.skip("fused kernels round elsewhere than eager ones")
    model = made(device_of(executor), dtype)
    runs.reset(model)
    assert_same_texts(model, drafter_of("hydra", model), executor)


def test_a_ragged_batch_with_refills(executor):
    """Eleven texts of different lengths through three rows, each equal to itself alone."""
    model = made(device_of(executor))
    torch.manual_seed(11)
    texts = []
    for number in range(11):
        tokens = torch.randint(30, 61, (1 + (number * 7) % 40,)).tolist()
        tokens[len(tokens) // 2 :] = tokens[: len(tokens) - len(tokens) // 2]
        new = 1 + (number * 13) % 20
        texts.append(Text(tokens, new, 100 + number, len(tokens) + new, number))
    got = {}

    def finish(text, tokens, failed):
        assert not failed
        got[text.name] = tokens

    decode_texts(model, texts, finish, batch=3, drafter=NgramDrafter(), temperature=0.9, executor=executor)
    for text in texts:
        ids = torch.tensor([text.tokens], device=model.device)
        options = dict(do_sample=True, temperature=0.9, top_k=0, seed=[text.seed], max_new_tokens=text.new_tokens)
        alone = paceline.generate(model, ids, torch.ones_like(ids), executor="eager", **options)
        assert got[text.name] == alone[0, len(text.tokens) :].tolist()


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamed_tokens_are_the_text(executor):
    model = made(device_of(executor))
    ids, _ = prompts(model.device)[0]
    truth = decode(model, NgramDrafter(), "eager", [ids[:1]], eos_token_id=None)
    heard = Heard()
    text = decode(model, NgramDrafter(), executor, [ids[:1]], streamer=heard, eos_token_id=None)
    assert torch.equal(text, truth) and heard.tokens == truth[0].tolist() and heard.ended


@pytest.mark.slow
def test_an_end_of_text_at_every_place(executor):
    """A row may end at any token of a step, and what the step that runs ahead of the host adds is cut."""
    model = made(device_of(executor))
    batch = prompts(model.device)[0]
    text = decode(model, NgramDrafter(), "eager", batch, eos_token_id=None)[0, batch[0].shape[1] :].tolist()
    for place in range(0, 12):
        ends = [text[place]]
        truth = decode(model, NgramDrafter(), "eager", batch, eos_token_id=ends)
        assert torch.equal(decode(model, NgramDrafter(), executor, batch, eos_token_id=ends), truth)
    assert len(captures_of(model)) == 1, "which tokens end a text is data"


@pytest.mark.slow
def test_two_engines_take_turns_in_one_pool(executor):
    """Captures on a device share a memory pool; neither may find what the other left."""
    model = made(device_of(executor))
    runs.reset(model)
    hydra, ngram = drafter_of("hydra", model), NgramDrafter()
    for seed, batch in enumerate(prompts(model.device) * 2):
        for drafter, tree in ((hydra, "3x2x1"), (ngram, "chain:5")):
            truth = decode(model, drafter, "eager", batch, seed, tree=tree, way="sampled")
            assert torch.equal(decode(model, drafter, executor, batch, seed, tree=tree, way="sampled"), truth)
    assert len(captures_of(model)) == 2


def test_a_prompt_longer_than_the_chunk(executor):
    model = made(device_of(executor))
    assert_same_texts(model, drafter_of("model", model), executor, prefill_chunk=4)


def moved(model):
    """Every parameter lies somewhere else, with the same numbers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def replaced(model):
    """One layer has other weights somewhere else."""
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach(), requires_grad=False)


def changed_in_place(model):
    """The same memory, other numbers."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)


@pytest.mark.parametrize("change", [moved, replaced, changed_in_place])
def test_a_capture_never_reads_weights_that_are_elsewhere(executor, change):
    model = tiny_llama(seed=7).to(device_of(executor))
    before = decode(model, NgramDrafter(), executor, prompts(model.device)[0])
    assert torch.equal(before, decode(model, NgramDrafter(), "eager", prompts(model.device)[0]))
    (old,) = captures_of(model)
    change(model)
    assert_same_texts(model, NgramDrafter(), executor)
    (new,) = captures_of(model)  # what is bound to other memory is not kept
    assert (new is old) == (change is changed_in_place)
    if change is not moved:
        assert not torch.equal(before, decode(model, NgramDrafter(), executor, prompts(model.device)[0]))


def test_a_capture_sees_that_the_drafter_moved(executor):
    model = made(device_of(executor))
    runs.reset(model)
    drafter = drafter_of("model", model)
    assert_same_texts(model, drafter, executor)
    moved(drafter.model)
    assert_same_texts(model, drafter, executor)
    assert len(captures_of(model)) == 2


@cuda
@pytest.mark.parametrize("name", CAPTURED)
def test_a_model_that_left_and_came_back_is_captured_again_on_cuda(name):
    model = tiny_llama(seed=7).cuda()
    assert_same_texts(model, NgramDrafter(), name)
    model.cpu()
    ballast = torch.ones(1 << 20, device="cuda")  # takes the memory that was the model's
    assert_same_texts(model, NgramDrafter(), "eager")
    model.cuda()
    assert_same_texts(model, NgramDrafter(), name)
    assert ballast.sum() == 1 << 20


@two_gpus
@pytest.mark.parametrize("name", ["eager", "compiled", *CAPTURED])
def test_another_gpu_than_the_first(name):
    model = tiny_llama(seed=2).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same_texts(model, drafter_of("model", model), name, way="sampled")
    out = decode(model, NgramDrafter(), name, prompts("cuda:1")[0], return_dict_in_generate=True)
    assert all(seconds >= 0 for event in out.trace.events for seconds in event.seconds.values())


@cuda
@pytest.mark.parametrize("name", CAPTURED)
def test_replays_on_cuda_never_wait_and_take_no_memory(name):
    model = made("cuda")
    runs.reset(model)
    subject = Subject("tiny", model, [name], lambda kind, target: NgramDrafter())
    for task in captured_tasks(subject, name, 20):
        (finding,) = task.work()
        assert finding.verdict == HOLDS, finding
    assert STEPS == 200


@cuda
def test_the_check_holds_on_cuda(tmp_path):
    tiny_llama(vocab=97).save_pretrained(tmp_path / "tiny")
    line = ["check", "--model", str(tmp_path / "tiny"), "--device", "cuda", "--executors", "eager,cuda_graph_eager"]
    assert cli.main([*line, "--budget", "60", "-o", str(tmp_path / "check.json")]) == 0
