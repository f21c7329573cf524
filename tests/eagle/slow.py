"""EAGLE from its published formulas: one pair after another, no cache, in double precision. The oracle of the network.

Pair t is the feature at position t and the token after it. Nothing of the network is called; only its stored numbers,
and the target's, are read.
"""

import math

import torch


class SlowEagle:
    def __init__(self, network, target):
        config = network.config
        self.settings, self.eps, self.layers = network.settings, config.rms_norm_eps, config.num_hidden_layers
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.numbers = {name: tensor.double() for name, tensor in network.stored().items()}
        known = self.numbers.get("vocabulary", torch.arange(target.config.vocab_size)).long()
        own = self.settings.own_embeddings
        self.embeddings = self.numbers["embeddings"] if own else target.get_input_embeddings().weight.double()
        head = target.get_output_embeddings().weight.double()[known]
        self.head = self.numbers["lm_head.weight"] if self.settings.own_head else head
        self.sizes = network.tap_sizes
        layer = self.settings.layer
        slides = [kind == "sliding_attention" for kind in layer.get("layer_types", ["full_attention"] * self.layers)]
        self.windows = [layer["sliding_window"] if here else 10**9 for here in slides]

    def linear(self, x, name):
        out = self.numbers[f"{name}.weight"] @ x
        return out + self.numbers[f"{name}.bias"] if f"{name}.bias" in self.numbers else out

    def norm(self, x, name, wanted=True):
        if not wanted:
            return x
        return x / (x.square().mean() + self.eps).sqrt() * self.numbers[f"{name}.weight"]

    def fused(self, feature):
        """The target's feature (F,) in the draft's width (H,)."""
        states = feature.double().split(self.sizes)
        parts = [self.norm(state, f"tap_norms.{i}", self.settings.tap_norms) for i, state in enumerate(states)]
        joined = self.norm(torch.cat(parts), "fuse_norm", self.settings.fuse_norm)
        return self.linear(joined, "fuse") if "fuse.weight" in self.numbers else joined

    def last(self, pairs):
        """Of the last of these pairs (feature (H,), token), at positions 0, 1, ...: logits (V',) and the feature that
        stands in for the target's at the next position (H,)."""
        settings, hidden = self.settings, []
        wide_inputs, wide_rests = [], []
        for feature, token in pairs:
            embedding = self.embeddings[token]
            if settings.wide:
                normed = self.norm(feature, "layers.0.hidden_norm")
                wide_inputs.append(torch.cat([self.norm(embedding, "layers.0.input_layernorm"), normed]))
                wide_rests.append(normed if settings.norm_before_residual else feature)
            else:
                first = self.norm(embedding, "embedding_norm", settings.embedding_norm)
                second = self.norm(feature, "feature_norm", settings.feature_norm)
                hidden.append(self.linear(torch.cat([first, second]), "join"))
        for number in range(self.layers):
            name = f"layers.{number}"
            if number == 0 and settings.wide:
                inputs, rests = wide_inputs, wide_rests
            else:
                normed = number > 0 or settings.input_norm
                inputs = [self.norm(state, f"{name}.input_layernorm", normed) for state in hidden]
                rests = hidden
            all_attended = self.attention(inputs, f"{name}.self_attn", self.windows[number])
            hidden = [rest + attended for rest, attended in zip(rests, all_attended)]
            hidden = [state + self.mlp(state, name) for state in hidden]
        out = self.norm(hidden[-1], "norm", settings.final_norm)
        return self.head @ out, out if settings.norm_output else hidden[-1]

    def mlp(self, state, name):
        x = self.norm(state, f"{name}.post_attention_layernorm")
        gate = self.linear(x, f"{name}.mlp.gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def attention(self, inputs, name, window):
        """Causal attention over vectors at positions 0, 1, ..., to the last `window` of them; query head h reads the
        key head of its group."""
        read = {}
        for kind, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            split = [self.linear(x, f"{name}.{kind}_proj").unflatten(0, (heads, -1)) for x in inputs]
            if f"{name}.{kind}_norm.weight" in self.numbers:
                split = [torch.stack([self.norm(head, f"{name}.{kind}_norm") for head in each]) for each in split]
            turned = [[self.turned(head, place) for head in each] for place, each in enumerate(split)]
            read[kind] = split if kind == "v" else turned
        outputs = []
        for place in range(len(inputs)):
            parts = []
            for head in range(self.heads):
                group, query = head * self.groups // self.heads, read["q"][place][head]
                seen = range(max(0, place + 1 - window), place + 1)
                scores = [read["k"][at][group] @ query / math.sqrt(len(query)) for at in seen]
                shares = torch.stack(scores).softmax(0)
                parts.append(sum(share * read["v"][at][group] for at, share in zip(seen, shares)))
            outputs.append(self.linear(torch.cat(parts), f"{name}.o_proj"))
        return outputs

    def turned(self, x, place):
        """Rotary embedding: number i and number i + d/2 are turned by place * theta ** (-2 i / d)."""
        half = len(x) // 2
        angles = place * self.theta ** (-torch.arange(half).double() / half)
        low, high = x[:half], x[half:]
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])
