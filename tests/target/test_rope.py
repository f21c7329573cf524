"""Scaled rotary embeddings, up to and beyond the context: transformers' own texts, of a freshly loaded model."""

import copy
import pickle

import paceline
import pytest
import torch
from paceline.drafters.draft_model import ModelDrafter
from paceline.spec.engines.module_state import structure
from transformers import AutoConfig, AutoModelForCausalLM

from support.models import noisy_copy, tiny_llama
from support.sentences import sentence

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::paceline.spec.arguments.BeyondContext"),
]
CONTEXT, THETA = 32, dict(rope_theta=100.0)
LONG = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 4.0], original_max_position_embeddings=CONTEXT)
SCALED = {
    "default": dict(rope_type="default", **THETA),
    "linear": dict(rope_type="linear", factor=4.0, **THETA),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=CONTEXT, **THETA),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=CONTEXT // 2, **THETA,
    ),
    "dynamic": dict(rope_type="dynamic", factor=4.0, **THETA),
    "longrope": dict(rope_type="longrope", factor=4.0, **LONG, **THETA),
}  # fmt: skip
GREEDY = dict(do_sample=False, max_new_tokens=24, pad_token_id=0)


def scaled(kind):
    return tiny_llama(max_position_embeddings=CONTEXT, rope_parameters=dict(SCALED[kind]))


def prompt(width, rows=1):
    return torch.randint(3, 61, (rows, width), generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize(("kind", "width"), [*((kind, 20) for kind in SCALED), ("dynamic", 40), ("longrope", 40)])
def test_texts_beyond_the_context_are_transformers_own(kind, width):
    """Across the length at which frequencies change, and behind it; alone, and beside shorter prompts."""
    model = scaled(kind)
    drafter = ModelDrafter(noisy_copy(model))
    for rows, drafting in ((1, "ngram"), (3, drafter)):
        ids = prompt(width, rows)
        mask = torch.ones_like(ids)
        for row in range(rows):
            mask[row, : 7 * row] = 0
        truth = scaled(kind).generate(ids * mask, attention_mask=mask, **GREEDY)
        assert torch.equal(
            paceline.generate(model, ids * mask, mask, drafter=drafting, prefill_chunk=7, **GREEDY), truth
        )
    sampled = dict(GREEDY, do_sample=True, seed=[5, 6, 7])
    plain = paceline.generate(model, ids * mask, mask, **sampled)
    assert torch.equal(paceline.generate(model, ids * mask, mask, drafter=drafter, **sampled), plain)


def test_changing_frequencies_are_those_of_a_fresh_model_and_leave_the_model_as_it_was():
    for kind in ("dynamic", "longrope"):
        model, ids = scaled(kind), prompt(40)
        first = paceline.generate(model, ids, drafter="ngram", **GREEDY)
        state = structure(model), {name: part.clone() for name, part in model.named_buffers()}
        assert torch.equal(paceline.generate(model, prompt(70), **GREEDY)[:, :70], prompt(70))
        assert structure(model) == state[0]
        assert all(torch.equal(part, state[1][name]) for name, part in model.named_buffers())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.generate(ids, **GREEDY), first), "transformers' own forwards are as before"
            assert torch.equal(paceline.generate(other, ids, drafter="ngram", **GREEDY), first)
        assert torch.equal(paceline.generate(model, ids, **GREEDY), first), "whatever was decoded in between"


def test_frequencies_by_layer_type():
    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, eos_token_id=None, max_position_embeddings=CONTEXT, initializer_range=0.3,
        sliding_window=6, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False,
        rope_parameters=dict(full_attention=dict(SCALED["dynamic"]), sliding_attention=dict(SCALED["default"])),
    )  # fmt: skip

    def fresh():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes)).eval()

    for width in (16, 40):
        truth = fresh().generate(prompt(width), **GREEDY)
        assert torch.equal(paceline.generate(fresh(), prompt(width), drafter="ngram", **GREEDY), truth)
        assert len(set(truth[0, width:].tolist())) > 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_kept_prompts_are_used_where_they_were_rotated_alike(kind):
    """A turn within the context, one that crosses its end, and one behind it."""
    model, kept, text = scaled(kind), paceline.PromptCache(), prompt(8)
    reused = []
    for new in (8, 24, 8, 8):
        options = dict(GREEDY, max_new_tokens=new)
        before, truth = kept.tokens_reused, scaled(kind).generate(text, **options)
        assert torch.equal(paceline.generate(model, text, reuse=kept, drafter="ngram", **options), truth)
        reused.append(kept.tokens_reused - before)
        text = torch.cat([truth, prompt(3)], dim=1)
    assert reused == [0, 14, 0, 52 if kind == "longrope" else 0]


PHI = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4 * CONTEXT, original_max_position_embeddings=CONTEXT,
    eos_token_id=None, pad_token_id=0, bos_token_id=1, initializer_range=0.3,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_texts_that_are_read_anew_where_they_cross_are_refused(kind):
    rope = dict(rope_type="longrope", **LONG, **THETA)
    if kind == "phimoe":
        rope |= dict(short_mscale=1.1, long_mscale=1.3)
    config = AutoConfig.for_model(kind, rope_parameters=rope, num_local_experts=2, **PHI)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    sentence(lambda: paceline.generate(model, prompt(16), **GREEDY), "beyond 32 positions", "use model.generate")
    widths = dict(phi3=((8, 24), (40, 24)), phimoe=((8, 16),))[kind]
    for width, new in widths:
        options = dict(GREEDY, max_new_tokens=new)
        truth = model.generate(prompt(width), **options)
        assert torch.equal(paceline.generate(model, prompt(width), drafter="ngram", prefill_chunk=5, **options), truth)
    if kind == "phimoe":  # whose long texts depend on the chunks in which they are read
        sentence(lambda: paceline.generate(model, prompt(40), **GREEDY), "beyond 32 positions")
    with paceline.patch(model, "ngram") as patched, pytest.warns(UserWarning, match="beyond 32 positions"):
        model.generate(prompt(16), **GREEDY)
    assert list(patched.fell_back.values()) == [1]
