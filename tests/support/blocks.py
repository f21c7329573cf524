"""Weights in blocks made in tests: random ones of every type, GGUF files of tiny models, and rounded models."""

import copy
import itertools

import numpy as np
import torch
from paceline.spec.kernels.block_linear import BlockLinear
from paceline.spec.kernels.blocks import Blocks
from paceline.spec.quantise.model import Recipe
from torch import nn

SCALES = {  # of each type: the places of its half-precision numbers in a block
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "Q8_0": [0], "IQ4_NL": [0],
}  # fmt: skip
SPREAD = {  # of each type: the scale that gives weights of a standard deviation near 0.06, as tiny models have
    "Q2_K": 0.004, "Q3_K": 0.0015, "Q4_0": 0.013, "Q4_1": 0.005, "Q4_K": 0.0003, "Q5_0": 0.006, "Q5_1": 0.003,
    "Q5_K": 0.0001, "Q6_K": 4e-5, "Q8_0": 0.0008, "IQ4_NL": 0.001,
}  # fmt: skip

RECIPE = Recipe(bits=4, group=32)  # by which tiny models are quantised


def some_texts(vocab=61, count=6, length=40):
    torch.manual_seed(5)
    return torch.randint(1, vocab, (count, length)).tolist()


def random_blocks(kind, rows, columns, seed=0, scale=0.01):
    """The bytes (rows, bytes of a row) of a weight (rows, columns): random, but for scales that are sane."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    width, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, columns // width, size), dtype=np.uint8)
    for start in SCALES[kind]:
        numbers = random.normal(0, scale, data.shape[:2]).astype(np.float16)
        data[..., start : start + 2] = numbers[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def write_tiny(path, kinds=("Q4_K",), embeddings="Q8_0", head=None, architecture="llama", seed=0):
    """A GGUF file of a random model of two layers. `kinds` are the types of its linear layers, in turns; without a
    `head`'s type the LM head is tied. Its tokenizer knows the 256 bytes, two pairs of them and two marks."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer, random = GGUFWriter(path, architecture), np.random.default_rng(seed)
    tokens = [*bytes_to_unicode().values(), "ab", "cd", "<s>", "</s>"]
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 258 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)

    seeds = itertools.count(seed)

    def add(name, kind, *shape):
        if kind in SCALES:
            data = random_blocks(kind, *shape, next(seeds), SPREAD[kind])
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        else:
            mean = 1.0 if "norm" in name else 0.0
            writer.add_tensor(name, random.normal(mean, 0.06, shape).astype({"F32": "f4", "F16": "f2"}[kind]))

    turns = itertools.cycle(kinds)
    add("token_embd.weight", embeddings, len(tokens), 256)
    for layer in range(2):
        for name, rows, columns in (
            ("attn_q", 256, 256), ("attn_k", 128, 256), ("attn_v", 128, 256), ("attn_output", 256, 256),
            ("ffn_gate", 512, 256), ("ffn_up", 512, 256), ("ffn_down", 256, 512),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", next(turns), rows, columns)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", "F32", rows)
        norms = ["attn_norm", "ffn_norm"]
        if architecture in ("gemma2", "gemma3"):
            norms += ["post_attention_norm", "post_ffw_norm"]
        for name in norms:
            add(f"blk.{layer}.{name}.weight", "F32", 256)
        if architecture in ("qwen3", "gemma3"):
            add(f"blk.{layer}.attn_q_norm.weight", "F32", 32)
            add(f"blk.{layer}.attn_k_norm.weight", "F32", 32)
    add("output_norm.weight", "F32", 256)
    if head is not None:
        add("output.weight", head, len(tokens), 256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(weight, bits=4, group=16, offsets=False):
    """A weight (N, K) rounded to the nearest numbers of blocks."""
    parts = weight.detach().float().unflatten(1, (-1, group))  # (N, K / group, group)
    least, most, top = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True), 2**bits - 1
    if offsets:
        zero, start, scales = 0, least.half(), ((most - least) / top).half()
    else:
        zero, start = 2 ** (bits - 1), torch.zeros_like(least)
        scales = (parts.abs().amax(-1, keepdim=True) / (zero - 1)).half()
    codes = ((parts - start.float()) / scales.float() + zero).round().clamp(0, top).to(torch.uint8)
    return Blocks(codes.flatten(1), scales[..., 0], start[..., 0] if offsets else None, zero, bits)


def in_blocks(model, bits=4, int8_activations=False):
    """A copy of `model` whose linear layers are all in blocks, with offsets in every other one. A tied head's
    embeddings get the numbers of the blocks."""
    model = copy.deepcopy(model)
    linears = {path: layer for path, layer in model.named_modules() if type(layer) is nn.Linear}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    for number, (path, layer) in enumerate(linears.items()):
        bias = None if layer.bias is None else layer.bias.detach().clone()
        blocks = rounded(layer.weight, bits, offsets=number % 2 == 0)
        model.set_submodule(path, BlockLinear(blocks, bias, int8_activations).eval())
    if tied:
        embeddings.weight = nn.Parameter(model.get_output_embeddings().dequantised())
    return model.eval()


def dense_copy(model, blocks_model):
    """`model` with the numbers of `blocks_model`."""
    from paceline.spec.target.weights import dense_state

    model = copy.deepcopy(model)
    model.load_state_dict(dense_state(blocks_model))
    return model.eval()
