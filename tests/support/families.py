"""Tiny random models of every family: those that can be targets, those that are refused, and multimodal wrappers with
prompts for them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
    "recurrent_gemma": SIZES | dict(lru_width=32, attention_window_size=6, num_hidden_layers=3),
    "rwkv": OLD | dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64),
}  # fmt: skip
_DELTA = SIZES | dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    initializer_range=0.15,  # with 0.3 transformers' own two forms of the rule are up to 4e-5 apart
)  # fmt: skip
_SSD = SIZES | dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2, mamba_expand=2, mamba_chunk_size=4,
)  # fmt: skip
STATEFUL = {
    "lfm2": SIZES | dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": SIZES | MOE | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "qwen3_next": _DELTA | MOE | dict(shared_expert_intermediate_size=16),
    "qwen3_5_text": _DELTA,
    "olmo_hybrid": _DELTA | dict(linear_num_value_heads=2),
    "mamba2": OLD | dict(
        hidden_size=32, num_hidden_layers=2, state_size=4, head_dim=8, num_heads=8, n_groups=2, chunk_size=4,
    ),
    "falcon_h1": _SSD | dict(mamba_d_ssm=32, mamba_n_heads=4),
    "granitemoehybrid": _SSD | MOE | dict(layer_types=["mamba", "attention"], shared_intermediate_size=16),
    "bamba": _SSD | dict(attn_layer_indices=[1]),
    "nemotron_h": SIZES | dict(
        layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4, n_groups=2,
        chunk_size=4,
    ),
    "zamba2": SIZES | dict(
        num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, adapter_rank=4,
        mamba_d_state=4, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=4,
    ),
    "mamba": OLD | dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "falcon_mamba": OLD | dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "jamba": SIZES | MOE | dict(
        mamba_d_state=4, mamba_dt_rank=4, attn_layer_offset=1, attn_layer_period=2, expert_layer_period=2,
        expert_layer_offset=1,
    ),
}  # fmt: skip

KINDS = {"convolution": "lfm2", "gated delta": "qwen3_next", "mamba-2": "falcon_h1", "mamba-1": "mamba"}  # of states


def build(name, options):
    options = dict(options)
    torch.manual_seed(0)
    config = AutoConfig.for_model(options.pop("model_type", name), **({"initializer_range": 0.3} | options))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny(family, **options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **{**sizes, **options})
    return AutoModelForCausalLM.from_config(config).eval()


IMAGE, BEGIN, END = 60, 61, 62
TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    tie_word_embeddings=False,
)  # fmt: skip
SIGHT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)
WRAPPERS = {
    "llava": dict(
        vision_config=dict(model_type="clip_vision_model", projection_dim=16, **SIGHT), image_token_index=IMAGE,
        text_config=dict(model_type="llama", **TEXT), image_seq_length=4, vision_feature_select_strategy="default",
    ),
    "gemma3": dict(
        vision_config=dict(vision_use_head=False, **SIGHT), image_token_index=IMAGE, boi_token_index=BEGIN,
        text_config=TEXT | dict(
            sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
        ),
        eoi_token_index=END, mm_tokens_per_image=4,
    ),
    "qwen2_5_vl": dict(
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], out_hidden_size=32,
        ),
        text_config=TEXT | dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
        image_token_id=IMAGE, video_token_id=59, vision_start_token_id=BEGIN, vision_end_token_id=END,
    ),
    "mistral3": dict(
        vision_config=dict(model_type="pixtral", head_dim=8, **SIGHT | dict(image_size=16)), image_token_index=IMAGE,
        text_config=dict(model_type="mistral", sliding_window=None, **TEXT), spatial_merge_size=2,
    ),
}  # fmt: skip


def wrapper(kind):
    """A wrapper whose weights are large enough for its texts to wander."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    model.generation_config.eos_token_id = None
    return model


def pictured(kind, rows=1, seed=0):
    """`input_ids` (B, P) with an image in each, left padding in all but the first, and all that goes with them."""
    torch.manual_seed(seed)
    images = rows, 3, *(2 * (16 if kind == "mistral3" else 8,))
    texts = [torch.randint(3, 58, (9 - 2 * row,)).tolist() for row in range(rows)]
    texts = [[*text[:2], BEGIN, *[IMAGE] * 4, END, *text[2:]] for text in texts]
    width = len(texts[0])
    inputs = dict(
        input_ids=torch.tensor([[0] * (width - len(text)) + text for text in texts]),
        attention_mask=torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts]),
        pixel_values=torch.randn(images),
    )
    marks = (inputs["input_ids"] == IMAGE).long()
    if kind == "gemma3":
        inputs["token_type_ids"] = marks
    if kind == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]] * rows)
    if kind == "qwen2_5_vl":
        patches = dict(pixel_values=torch.randn(16 * rows, 96), image_grid_thw=torch.tensor([[1, 4, 4]] * rows))
        inputs |= patches | dict(mm_token_type_ids=marks)
    return inputs
