"""Trees whose scores are too many to exist together: the text of steps that compute them at once, bit for bit, from
memory that does not grow with nodes times vocabulary."""

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.drafters.eagle.drafter import EagleDrafter
from paceline.spec.engines import runs
from paceline.spec.kernels.linears import Packing
from paceline.spec.proposal import Proposal
from paceline.spec.target.last_part import LastPart
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, LogitsProcessorList

from support.families import SIZES, SUPPORTED, build, wrapper
from support.models import eagle_copy, noisy_copy, tiny_llama
from support.processors import Upwards

pytestmark = pytest.mark.usefixtures("one_thread")
TREE = "dynamic:18x4x4"
DETAILS = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


@pytest.fixture
def walked(monkeypatch):
    """Lets every eager step walk that can, and counts the nodes whose logits are computed."""
    counts, plain = [], LastPart.logits

    def counted(self, heard, tokens, nodes):
        counts.append(nodes.numel())
        return plain(self, heard, tokens, nodes)

    monkeypatch.setattr(LastPart, "logits", counted)
    monkeypatch.setattr(runs, "MOST_SCORES", 0)
    return counts


def at_once(*arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MOST_SCORES", 1 << 40)
        return paceline.generate(*arguments, **options)


def assert_same(found, truth):
    assert torch.equal(found.sequences, truth.sequences)
    for name in ("scores", "logits"):
        assert all(map(torch.equal, getattr(found, name), getattr(truth, name))), name
    events = [
        [(e.row, e.step, e.tokens, e.parents, e.accepted, e.bonus) for e in out.trace.events] for out in (found, truth)
    ]
    assert events[0] == events[1]


def brief():
    return tiny_llama().bfloat16()


WARPERS = [
    dict(do_sample=False),
    dict(do_sample=True, temperature=0.7, top_k=7, top_p=0.9, min_p=0.05),
    dict(do_sample=True, typical_p=0.8, epsilon_cutoff=0.01, eta_cutoff=0.01),
    dict(do_sample=True, top_h=0.6),
    dict(do_sample=False, suppress_tokens=[7, 9], remove_invalid_values=True, renormalize_logits=True),
    dict(do_sample=False, repetition_penalty=1.4, no_repeat_ngram_size=3, min_new_tokens=9),
    dict(do_sample=True, bad_words_ids=[[3, 4], [8]], temperature=0.8, sequence_bias={(5, 6): 2.0}),
    dict(do_sample=True, forced_eos_token_id=2),
    dict(do_sample=True, prefix_allowed_tokens_fn=lambda row, ids: [(int(ids[-1]) * k + row) % 61 for k in range(9)]),
    dict(do_sample=True, logits_processor=LogitsProcessorList([Upwards()])),
]  # fmt: skip


@pytest.mark.parametrize("options", WARPERS, ids=lambda options: "-".join(options))
def test_warpers_and_processors(target, draft, ragged, walked, options):
    options = dict(drafter=draft, tree=TREE, max_new_tokens=10, eos_token_id=[2, 11], seed=5, **DETAILS, **options)
    found = paceline.generate(target, *ragged, **options)
    assert walked[0] == 6 and set(walked[1:]) == {3}, "one node of each row at a time, after a trial"
    assert_same(found, at_once(target, *ragged, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", [*SUPPORTED, "granite"])
def test_families(name):
    """Soft caps (Gemma), scales of logits (Cohere, Granite), heads with a bias (GPT-J), windows, experts."""
    model = build(name, SUPPORTED.get(name, SIZES | dict(logits_scaling=5.0)))
    shape, base = TreeShape.parse("3x2x1"), torch.tensor([8, 5])
    tokens = torch.randint(3, 60, (2, len(shape)))
    slots = SlotModel(model, 2, capacity=32, unscored=True)
    slots.forward_text(torch.randint(3, 60, (2, 8)), torch.arange(8).expand(2, -1))
    proposal = Proposal(tokens, TokenTree.of(shape, "cpu"), "deterministic", "own")
    with Packing([model]):  # whose rows do not depend on one another
        truth = slots.forward_nodes(tokens, base, proposal.tree).logits
        for _ in range(2):  # the first forward finds out how
            seen = slots.forward(proposal, base)
            for nodes in (torch.tensor([[0], [9]]), torch.tensor([[3, 1], [15, 7]])):
                assert torch.equal(seen.logits_at(nodes), truth[torch.arange(2)[:, None], nodes])


@pytest.mark.parametrize("make", [lambda: build("gemma2", SUPPORTED["gemma2"]), lambda: wrapper("gemma3"), brief])
def test_texts_of_models(make, walked):
    """Capped logits, a model in a wrapper, and bfloat16 in kernels of our own."""
    model, ids = make(), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6, 7]])
    options = dict(drafter="ngram", tree="chain:5", max_new_tokens=12, do_sample=True, seed=3, **DETAILS)
    assert_same(paceline.generate(model, ids, **options), at_once(model, ids, **options))
    assert len(walked) > 1


def test_features_of_all_nodes_reach_the_drafter(target, ragged, walked):
    drafter = EagleDrafter(eagle_copy(target))
    options = dict(drafter=drafter, tree=TREE, max_new_tokens=8, do_sample=False, **DETAILS)
    assert_same(paceline.generate(target, *ragged, **options), at_once(target, *ragged, **options))
    assert walked


class Peculiar(LlamaForCausalLM):
    """Its logits depend on more than what its decoder returns."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].register_forward_hook(lambda layer, inputs, output: setattr(self, "early", output))

    def forward(self, input_ids=None, **options):
        out = super().forward(input_ids=input_ids, **options)
        count = out.logits.shape[1]
        out.logits = out.logits + (self.early @ self.lm_head.weight.T)[:, self.early.shape[1] - count :]
        return out


def test_models_that_are_built_otherwise_are_computed_at_once(draft, ragged, walked):
    options = dict(drafter=draft, tree=TREE, max_new_tokens=10, do_sample=False, **DETAILS)
    peculiar = Peculiar(tiny_llama().config).eval()
    peculiar.load_state_dict(tiny_llama().state_dict())
    replaced = tiny_llama()
    plain, replaced.forward = replaced.forward, lambda *inputs, **kwargs: plain(*inputs, **kwargs)
    for model, calls in ((peculiar, 1), (replaced, 0)):
        walked.clear()
        assert_same(paceline.generate(model, *ragged, **options), at_once(model, *ragged, **options))
        assert len(walked) == calls, "it is tried once"


def test_which_steps_walk(target, draft, ragged, walked):
    """Those that are eager, of rules that look at one path. Compiled and captured steps stay as they are."""
    for rule, way in (("typical", dict(do_sample=True)), ("residual", dict(do_sample=True))):
        paceline.generate(target, *ragged, drafter=draft, tree="3x2", verify=rule, max_new_tokens=5, **way)
        assert not walked
    runs.MOST_SCORES = 4 * 3 * 9 * 61  # bytes of three rows of nine nodes
    for tree, walks in (("4x1", False), ("9", True)):
        paceline.generate(target, *ragged, drafter=draft, tree=tree, do_sample=False, max_new_tokens=5)
        assert bool(walked) == walks


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_memory_does_not_grow_with_nodes_times_vocabulary(monkeypatch):
    """256 nodes of 6,000 tokens are 6 MB at once."""
    model, vocab, nodes = tiny_llama(vocab=6000, num_hidden_layers=1), 6000, 256
    options = dict(drafter=ModelDrafter(noisy_copy(model)), tree=f"dynamic:{nodes}x9x16", max_new_tokens=3)
    ids, greedy = torch.randint(3, 64, (1, 8)), dict(do_sample=False)
    sampled = dict(do_sample=True, temperature=0.9, top_p=0.9, top_k=50)
    for most, way in ((1 << 40, greedy), (1 << 20, greedy), (1 << 20, sampled)):
        monkeypatch.setattr(runs, "MOST_SCORES", most)
        with Largest() as largest:
            paceline.generate(model, ids, **options, **way)
        if most == 1 << 40:
            assert largest.bytes >= 4 * nodes * vocab
        else:
            assert largest.bytes <= 4 * 33 * vocab, "of 16 drafted nodes, in 64 bits"


def forwards_of(model):
    """A list that grows with each forward of `model`, which is known by now."""
    paceline.generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)
    forwards = []
    model.model.layers[0].register_forward_pre_hook(lambda *ignored: forwards.append(1))
    return forwards


@pytest.mark.parametrize("drafter, tree", [(None, None), ("ngram", "chain:1"), ("ngram", "3")])
def test_a_step_forwards_the_target_once(drafter, tree, walked):
    """Also without drafts, where there is no other node to try it by, and where guesses are all alike."""
    model, ids = tiny_llama(), torch.tensor([[5, 9, 6, 7], [7, 8, 5, 3]])  # in which nothing is repeated
    forwards = forwards_of(model)
    out = paceline.generate(
        model, ids, drafter=drafter, tree=tree, max_new_tokens=8, do_sample=False, executor="eager",
        return_dict_in_generate=True,
    )  # fmt: skip
    assert bool(walked) == (drafter is not None)
    assert len(forwards) == 1 + len({event.step for event in out.trace.events}), "the prompt is the other one"


def test_guesses_that_show_nothing_are_computed_at_once_from_then_on(walked):
    """A model whose logits are always the same tells nothing, and is asked once."""
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7]])
    torch.nn.init.zeros_(model.lm_head.weight)
    forwards = forwards_of(model)
    options = dict(drafter="ngram", tree="chain:2", max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    out = paceline.generate(model, ids, executor="eager", **options)
    assert len(forwards) == 2 + len(out.trace.events) and not walked
