"""Which model families can be targets: tree steps against cache-less forwards, on tiny random models.

Contexts are longer than the windows and chunks, so that those decide. Families that cannot follow
explicit positions and masks must be refused with a sentence.
"""

import pytest
import torch
from paceline.spec.target.protocol import spans
from paceline.spec.target.selftest import attach
from paceline.spec.target.slots import SlotModel
from paceline.spec.tree import TokenTree, TreeShape
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OLD = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SUPPORTED = {
    "llama": SIZES,
    "mistral": SIZES | dict(sliding_window=6),
    "qwen2": SIZES,
    "qwen2-windows": SIZES | dict(model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": SIZES,
    "qwen3_moe": SIZES | MOE,
    "mixtral": SIZES | MOE | dict(sliding_window=None),
    "gemma2": SIZES | dict(sliding_window=6),
    "gemma3_text": SIZES | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "phi3": SIZES,
    "olmo2": SIZES,
    "olmo3": SIZES | dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "cohere": SIZES,
    "gpt2": OLD | dict(n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": SIZES,
    "opt": OLD | dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32),
    "gptj": OLD | dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=8),
    "falcon": OLD | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, multi_query=True),
    "llama4_text": SIZES | dict(
        attention_chunk_size=6, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=32,
        layer_types=["chunked_attention", "full_attention"], attn_temperature_tuning=False,
    ),
    "gpt_oss": SIZES | dict(
        sliding_window=6, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": SIZES | dict(
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, n_shared_experts=1,
    ),
}  # fmt: skip
REFUSED = {
    "bloom": OLD | dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": OLD | dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "gpt_neo": OLD | dict(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6,
        max_position_embeddings=128,
    ),
    "falcon-alibi": OLD | dict(
        model_type="falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mamba": OLD | dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": OLD | dict(hidden_size=32, num_hidden_layers=2, state_size=4, head_dim=8, num_heads=8, n_groups=1),
    "falcon_h1": SIZES | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1),
    "qwen3_next": SIZES | MOE | dict(
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip


def build(name, options):
    options = dict(options)
    torch.manual_seed(0)
    config = AutoConfig.for_model(options.pop("model_type", name), **options, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SUPPORTED)
def test_tree_steps_equal_cacheless_forwards(name):
    """Two ragged rows, three steps with commits of different paths: every node's logits to 1e-5 of the largest."""
    model = build(name, SUPPORTED[name])
    attach(model)
    shape = TreeShape.parse("2x2x1")
    tree = TokenTree.of(shape, "cpu")
    torch.manual_seed(3)
    texts = [torch.randint(3, 64, (length,)).tolist() for length in (11, 8)]
    slots = SlotModel(model, 2, capacity=64)
    for span in spans(torch.tensor([texts[0], [*texts[1], 0, 0, 0]]), torch.tensor([11, 8]), chunk=4):
        slots.read(span)
    for step in range(3):
        base = torch.tensor([len(text) - 1 for text in texts])
        tokens = torch.randint(3, 64, (2, tree.size))
        tokens[:, 0] = torch.tensor([text[-1] for text in texts])
        logits = slots.forward_nodes(tokens, base, tree).logits
        for row, text in enumerate(texts):
            for node in range(tree.size):
                nodes = tree.paths[0, node, : tree.depths[0, node] + 1]
                ids = torch.tensor([text[:-1] + tokens[row, nodes].tolist()])
                truth = model(input_ids=ids, use_cache=False).logits[0, -1]
                assert (logits[row, node] - truth).abs().max() <= 1e-5 * max(1, truth.abs().max())
        chosen = [tree.size - 1 - step, 2 + step]
        slots.commit(base, tree.paths[0, chosen], tree.depths[0, chosen] + 1)
        for row, node in enumerate(chosen):
            path = tree.paths[0, node, 1 : tree.depths[0, node] + 1]
            texts[row] += [*tokens[row, path].tolist(), 5 + step]


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_are_refused_in_a_sentence(name):
    model = build(name, REFUSED[name])
    with pytest.raises(ValueError) as caught:
        attach(model)
    sentence = str(caught.value)
    assert "\n" not in sentence and type(model).__name__ in sentence and "; use a model" in sentence, sentence
    reason = (
        "recurrent state" if name in ("mamba", "mamba2", "falcon_h1", "qwen3_next") else "cannot be decoded with trees"
    )
    assert reason in sentence


def test_other_attention_and_training_mode_are_refused(target):
    model = build("llama", SIZES)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        attach(model)
    model.eval()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        attach(model)


@torch.no_grad()
def test_the_hook_leaves_other_forwards_alone(target, ragged):
    """Before, between and after slot forwards the stock masks answer, in this thread and in others."""
    import threading

    ids, mask = ragged
    before = target(input_ids=ids, attention_mask=mask).logits
    slots = SlotModel(target, len(ids), capacity=64)
    for span in spans(ids, mask.sum(1), chunk=512):
        slots.read(span)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(target(input_ids=ids, attention_mask=mask).logits))
    thread.start()
    thread.join()
    assert torch.equal(before, target(input_ids=ids, attention_mask=mask).logits)
    assert torch.allclose(before, seen[0])
