"""Kept prompts: the text is the same with and without them, and what was read before is not read again."""

import gc
import weakref

import paceline
import pytest
import torch
from paceline.drafters.medusa import MedusaDrafter
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.engines import runs
from paceline.spec.kernels import native
from paceline.spec.target.slots import SlotModel

from support.models import fitted_heads, noisy_copy, tiny_llama
from support.sentences import sentence

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = {"greedy": dict(do_sample=False), "sampled": dict(do_sample=True, temperature=0.8, top_k=0, seed=3)}
DRAFTERS = {
    "none": lambda model: None,
    "ngram": lambda model: "ngram",
    "model": lambda model: paceline.load_drafter(noisy_copy(model), model),
    "hydra": lambda model: MedusaDrafter(fitted_heads(model, "hydra", steps=20)),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture
def read(monkeypatch):
    """How many tokens were read by whom: {id of the model: tokens}"""
    counts, real = {}, SlotModel.read

    def counting(slots, span):
        tokens = int((span.positions >= 0).sum())
        counts[id(slots.model)] = counts.get(id(slots.model), 0) + tokens
        return real(slots, span)

    monkeypatch.setattr(SlotModel, "read", counting)
    return counts


class Streamed:
    """A target that runs and whose rows cannot be kept."""

    def __init__(self, *arguments, **options):
        self.slots = SlotModel(*arguments, **options)

    def __getattr__(self, name):
        if name == "save_row":
            raise AttributeError(name)
        return getattr(self.slots, name)


def batch(texts):
    width = max(map(len, texts))
    rows = [([0] * (width - len(text)) + text, [0] * (width - len(text)) + [1] * len(text)) for text in texts]
    return torch.tensor([row for row, _ in rows]), torch.tensor([mask for _, mask in rows])


def some_tokens(count, seed):
    return torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def continued(model, texts, **options):
    ids, mask = batch(texts)
    out = paceline.generate(model, ids, mask, **{"max_new_tokens": 9, "executor": "eager", **options})
    return [row[len(mask[0]) - int(mask[i].sum()) :].tolist() for i, row in enumerate(out)]


def chat(model, cache, drafter, way, executor="eager"):
    """Three turns of two talks of different lengths; the texts after each turn."""
    texts, turns = [some_tokens(19, 1), some_tokens(6, 2)], []
    for turn in range(3):
        options = dict(WAYS[way], drafter=drafter, reuse=cache, executor=executor, prefill_chunk=5 + turn)
        texts = continued(model, texts, **options)
        turns.append(texts)
        texts = [text + some_tokens(4, 10 * turn + row) for row, text in enumerate(texts)]
    return turns


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["none", "ngram", "model", "hydra"])
def test_the_turns_of_a_chat_read_what_is_new(model, read, name, way):
    drafter, cache = DRAFTERS[name](model), paceline.PromptCache()
    continued(model, [[5]], drafter=drafter)  # the self-tests read, too
    read.clear()
    plain = chat(model, None, drafter, way)
    whole = dict(read)
    read.clear()
    assert chat(model, cache, drafter, way) == plain
    first, new = 19 + 6 - 2, 2 * (4 + 2 - 1)  # two tokens of each text are not kept, its last one is not read
    assert set(read.values()) == {first + 2 * new} and read.keys() == whole.keys()
    assert set(whole.values()) == {first + sum(len(text) + 3 for turn in plain[:2] for text in turn)}
    assert cache.tokens_read == first + 2 * new
    assert cache.tokens_reused == sum(len(text) - 2 for turn in plain[:2] for text in turn)
    assert len(cache) == 2, "a text takes the place of its beginning"


@pytest.mark.parametrize("name", ["none", "model", "hydra"])
def test_prompts_in_any_order_beside_others(model, read, name):
    """A common beginning, in rows that change places; beginnings of what is kept; equal prompts; and new ones."""
    drafter, cache, system = DRAFTERS[name](model), paceline.PromptCache(), some_tokens(12, 5)
    prompts = [system + some_tokens(3, 6), some_tokens(8, 7), system[:7], system + some_tokens(5, 8)]
    for rows in ([0, 1], [1, 0], [3, 2], [0, 0], [2, 1], [3]):
        texts = [prompts[row] for row in rows]
        plain = continued(model, texts, drafter=drafter)
        read.clear()
        assert continued(model, texts, drafter=drafter, reuse=cache) == plain
        known = [0, 0] if rows == [0, 1] else [12, 5] if rows == [3, 2] else [len(text) - 2 for text in texts]
        assert read[id(model)] == sum(len(text) - 1 - count for text, count in zip(texts, known))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shortest_prompts(model, count):
    cache, text = paceline.PromptCache(), some_tokens(3, 1)[:count]
    for _ in range(2):
        assert continued(model, [text], reuse=cache) == continued(model, [text])
    assert cache.tokens_reused == max(count - 2, 0)


@pytest.mark.parametrize("change", ["weights", "weights through data", "a module"])
def test_nothing_is_reused_once_the_model_has_changed(change):
    if change == "weights through data" and not native.prepare():
        pytest.skip("there are no packed copies to compare with")
    model, cache, text = tiny_llama(seed=3), paceline.PromptCache(), some_tokens(15, 1)
    continued(model, [text], reuse=cache)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if change == "weights":
            model.model.layers[1].input_layernorm.weight.mul_(1.5)
        elif change == "weights through data":
            weight.data.mul_(-1.5)
        else:
            model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    changed = continued(model, [text], reuse=cache)
    assert cache.tokens_reused == 0 and len(cache) == 1
    assert changed == continued(model, [text])


def test_a_changed_draft_model_reads_anew_and_another_drafter_uses_the_same_text(model, read):
    draft, cache, text = noisy_copy(model), paceline.PromptCache(), some_tokens(15, 1)
    plain = continued(model, [text])
    for drafter, reused in ((None, 0), ("ngram", 13), (draft, 0), (draft, 13), (None, 13)):
        cache.tokens_reused = 0
        assert continued(model, [text], drafter=drafter, reuse=cache) == plain
        assert cache.tokens_reused == reused
    with torch.no_grad():
        draft.lm_head.weight.add_(0.1)
    assert continued(model, [text], drafter=draft, reuse=cache) == plain
    assert cache.tokens_reused == 13, "nothing more"


def test_what_is_kept_is_bounded_and_freed_with_its_model(model):
    cache = paceline.PromptCache(texts=2)
    for seed in range(3):
        continued(model, [some_tokens(12, seed)], reuse=cache)
    assert len(cache) == 2
    continued(model, [some_tokens(12, 0)], reuse=cache)
    assert cache.tokens_reused == 0, "the one used first was dropped"
    assert cache.nbytes == 2 * (12 + 9 - 2) * 2 * 2 * 16 * 4  # texts, tokens, layers, keys and values, numbers
    small = paceline.PromptCache(megabytes=cache.nbytes * 0.9e-6)
    for seed in range(3):
        continued(model, [some_tokens(12, seed)], reuse=small)
    assert len(small) == 1
    other = tiny_llama(seed=4)
    continued(other, [some_tokens(12, 0)], reuse=cache)
    gone = weakref.ref(other)
    runs.reset(other)
    del other
    gc.collect()
    assert gone() is None and len(cache) == 1
    cache.clear()
    assert len(cache) == cache.nbytes == 0


def test_what_is_refused(model, monkeypatch):
    sentence(lambda: continued(model, [[5, 6]], reuse={}), "reuse is a dict", "paceline.PromptCache()")
    sentence(lambda: paceline.PromptCache(texts=0), "PromptCache(texts=0", "above 0")

    class Remembering(NgramDrafter):
        traits = paceline.spec.proposal.DrafterTraits(follows_any_tree=True)

    cache = paceline.PromptCache()
    sentence(lambda: continued(model, [[5, 6]], drafter=Remembering(), reuse=cache), "drafter 'ngram'", "leave out")
    monkeypatch.setattr(runs, "SlotModel", Streamed)
    sentence(lambda: continued(model, [[5, 6]], reuse=cache), "target LlamaForCausalLM", "leave out")


@pytest.mark.slow
def test_compiled_steps_go_on_from_kept_prompts(model, traced_only):
    drafter = paceline.load_drafter("ngram", model)
    plain = chat(model, None, drafter, "greedy")
    cache = paceline.PromptCache()
    assert chat(model, cache, drafter, "greedy", "compiled") == plain and cache.tokens_reused > 0
    assert chat(model, cache, drafter, "greedy") == plain, "by another executor"
    runs.reset(model)
