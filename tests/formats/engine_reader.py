"""EAGLE heads as vLLM 0.33 and SGLang 0.5.23 read them, written from their key lists and formulas.

Knows neither our reader, nor our names, nor our network. vLLM raises for a key that it does not know; SGLang drops it.
"""

import torch
from torch.nn import functional as F


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def frequencies(config, size):
    """Of the rotation, by the fields that servers before transformers 5 read."""
    inverse = config["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    scaling = config["rope_scaling"]
    if scaling is None:
        return inverse
    assert scaling["rope_type"] == "llama3"
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * torch.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (share + (1 - share) / scaling["factor"])


class Reader:
    """One sequence through an exported head: `hidden` (T, H) and tokens (T,) at positions 0, 1, ..."""

    def __init__(self, engine, config, tensors, target):
        self.engine, self.config, self.tensors, self.used = engine, config, dict(tensors), set()
        self.embeddings = target.get_input_embeddings().weight
        self.head = target.get_output_embeddings().weight
        own = "embed_tokens.weight" in tensors
        if own and (engine == "vllm" or config["target_hidden_size"] != config["hidden_size"]):
            self.embeddings = self.take("embed_tokens.weight")

    def take(self, name):
        self.used.add(name)
        return self.tensors[name]

    def bias(self, name):
        return self.take(name) if name in self.tensors else None

    def norm(self, x, name):
        return rms(x, self.take(f"{name}.weight"), self.config["rms_norm_eps"])

    def attention(self, x, layer):
        config, length = self.config, len(x)
        size, groups = config["head_dim"], config["num_attention_heads"] // config["num_key_value_heads"]
        name = f"layers.{layer}.self_attn"
        q, k, v = (
            F.linear(x, self.take(f"{name}.{part}_proj.weight"), self.bias(f"{name}.{part}_proj.bias"))
            .view(length, -1, size)
            .transpose(0, 1)
            for part in "qkv"
        )
        if config["model_type"] == "qwen3":
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        angles = torch.arange(length)[:, None] * frequencies(config, size)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k = (part * cos + torch.cat([-part[..., size // 2 :], part[..., : size // 2]], -1) * sin for part in (q, k))
        scores = q @ k.repeat_interleave(groups, 0).mT * size**-0.5
        mask = torch.ones(length, length).tril() == 0
        mixed = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)
        mixed = mixed.transpose(0, 1).reshape(length, -1)
        return F.linear(mixed, self.take(f"{name}.o_proj.weight"), self.bias(f"{name}.o_proj.bias"))

    def rest(self, hidden, layer):
        """Of a layer, after attention."""
        x = self.norm(hidden, f"layers.{layer}.post_attention_layernorm")
        up = {part: self.take(f"layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        return hidden + (F.silu(x @ up["gate"].T) * (x @ up["up"].T)) @ up["down"].T

    def first(self, tokens, hidden):
        """EAGLE-3's first layer."""
        normed = self.norm(hidden, "layers.0.hidden_norm")
        embedded = self.norm(self.embeddings[tokens], "layers.0.input_layernorm")
        before = self.config["norm_before_residual"] and self.engine != "sglang"
        attended = self.attention(torch.cat([embedded, normed], -1), 0)
        return self.rest((normed if before else hidden) + attended, 0)

    def later(self, hidden, layer):
        """A plain layer; engines name its first norm differently."""
        name = "hidden_norm" if self.engine == "sglang" and "fc_norm" in self.config else "input_layernorm"
        return self.rest(hidden + self.attention(self.norm(hidden, f"layers.{layer}.{name}"), layer), layer)

    def fused(self, states):
        """The feature of each position, from the target's `hidden_states` (L + 1 of (T, H))."""
        config = self.config
        eagle = config.get("eagle_config", {})
        if not eagle.get("use_aux_hidden_state", True):
            return states["head"]
        if self.engine == "sglang":
            ids = [number + 1 for number in eagle["eagle_aux_hidden_state_layer_ids"]]
        else:
            ids = config["eagle_aux_hidden_state_layer_ids"]
        assert ids == sorted(set(ids)) and len(ids) == config["num_aux_hidden_states"]
        joined = torch.cat([states[number] for number in ids], -1)
        assert self.engine != "sglang" or joined.shape[-1] != config["hidden_size"], "SGLang would skip fc"
        if eagle.get("norm_before_fc", config["norm_before_fc"]):
            joined = self.norm(joined, "input_norm")
        if config["fc_norm"]:
            chunks = joined.chunk(len(ids), -1)
            joined = torch.cat([self.norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(chunks)], -1)
        return F.linear(joined, self.take("fc.weight"))

    def eagle3(self, tokens, hidden):
        """Logits (T, V) and the feature that is fed back (T, H)."""
        hidden = self.first(tokens, hidden)
        for layer in range(1, self.config["num_hidden_layers"]):
            hidden = self.later(hidden, layer)
        normed = self.norm(hidden, "norm")
        logits = normed @ self.take("lm_head.weight").T
        if self.config["draft_vocab_size"] != self.config["vocab_size"]:
            offsets = self.take("d2t")
            assert offsets.dtype == torch.int64
            whole = logits.new_full((len(tokens), self.config["vocab_size"]), -torch.inf)
            whole[:, offsets + torch.arange(len(offsets))] = logits
            logits = whole
        return logits, normed if self.config["norm_output"] else hidden

    def eagle1(self, tokens, hidden):
        joined = torch.cat([self.embeddings[tokens], hidden], -1)
        bias = self.take("fc.bias") if self.engine == "sglang" else None
        hidden = F.linear(joined, self.take("fc.weight"), bias)
        hidden = self.rest(hidden + self.attention(hidden, 0), 0)
        for layer in range(1, self.config["num_hidden_layers"]):
            hidden = self.later(hidden, layer)
        return hidden @ self.head.T, hidden

    def check_keys(self):
        """vLLM raises for a tensor that it has no place for; every other one is there for the other engine."""
        spare = set(self.tensors) - self.used - {"t2d"}
        assert all(name.endswith((".hidden_norm.weight", ".input_layernorm.weight")) for name in spare), spare
