"""Tiny random models of every family: those that can be targets, and those that are refused."""

import torch
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


def tiny(family, **options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **{**sizes, **options})
    return AutoModelForCausalLM.from_config(config).eval()
