"""Published drafters made by tests: random files of every layout, and what they compute, written from the formulas.

Nothing here is shared with the code under test but the names of files.
"""

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

V, KNOWN = 61, 24  # tokens of the target, and of a trimmed head
LAYERS, WIDTH, INNER = 8, 32, 40


def config_of(**changes):
    """What nearly all configs say."""
    sizes = dict(
        architectures=["LlamaForCausalLMEagle3"], model_type="llama", hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=2048, vocab_size=V, tie_word_embeddings=False,
    )  # fmt: skip
    return {name: value for name, value in {**sizes, **changes}.items() if value is not None}


def drawn(*shape, scale=None):
    return torch.randn(*shape) * (scale or shape[-1] ** -0.5)


def norm(size):
    return 1 + 0.3 * torch.randn(size)


def layer(prefix, columns, width=WIDTH, heads=4, groups=2, head=8):
    """The tensors that all decoder layers have."""
    return {
        f"{prefix}self_attn.q_proj.weight": drawn(heads * head, columns),
        f"{prefix}self_attn.k_proj.weight": drawn(groups * head, columns),
        f"{prefix}self_attn.v_proj.weight": drawn(groups * head, columns),
        f"{prefix}self_attn.o_proj.weight": drawn(width, heads * head),
        f"{prefix}mlp.gate_proj.weight": drawn(INNER, width),
        f"{prefix}mlp.up_proj.weight": drawn(INNER, width),
        f"{prefix}mlp.down_proj.weight": drawn(width, INNER),
        f"{prefix}post_attention_layernorm.weight": norm(width),
    }


def eagle1(prefix="", bias=False):
    tensors = layer(f"{prefix}layers.0.", WIDTH) | {f"{prefix}fc.weight": drawn(WIDTH, 2 * WIDTH)}
    return tensors | ({f"{prefix}fc.bias": drawn(WIDTH)} if bias else {})


def eagle3(first="layers.0.", prefix="", taps=3, width=WIDTH, known=KNOWN, **sizes):
    """One layer, known tokens at random places, and a map from `taps` states."""
    tensors = layer(f"{prefix}{first}", 2 * width, width, **sizes)
    tensors |= {f"{prefix}{first}{name}.weight": norm(width) for name in ("input_layernorm", "hidden_norm")}
    tensors |= {f"{prefix}norm.weight": norm(width), "lm_head.weight": drawn(known, width, scale=1.0)}
    if taps:
        tensors[f"{prefix}fc.weight"] = drawn(width, taps * WIDTH)
    if known < V:
        ids = torch.randperm(V)[:known].sort().values
        tensors |= {"d2t": ids - torch.arange(known), "t2d": torch.isin(torch.arange(V), ids)}
    return tensors


def write(folder, tensors, config, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def rms(x, weight=1.0, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, base, positions):  # (n, heads, d)
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * base ** -(torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Reference:
    """The formulas of the layouts, one text at a time, with plain tensors by their published names."""

    def __init__(
        self, tensors, target, ids=None, base=10000.0, residual_normed=False, output_normed=False, head=8, window=99
    ):
        strip = (
            "model.",
            "midlayer.",
            "transformer.",
            "fusion_fc.",
            "aux_norm_low.",
            "aux_norm_mid.",
            "aux_norm_high.",
        )
        to = ("", "layers.0.", "layers.0.", "fc.", "fc_norm.0.", "fc_norm.1.", "fc_norm.2.")
        self.t = {}
        for name, tensor in tensors.items():
            for old, new in zip(strip, to):
                name = new + name[len(old) :] if name.startswith(old) else name
            self.t[name] = tensor.float()
        self.target, self.ids, self.base, self.head, self.window = target, ids, base, head, window
        self.residual_normed, self.output_normed = residual_normed, output_normed
        self.eagle3 = "layers.0.hidden_norm.weight" in self.t
        self.layers = len({name.split(".")[1] for name in self.t if name.startswith("layers.")})
        self.embeddings = self.t.get("embed_tokens.weight") if self.eagle3 else None
        if self.embeddings is None:
            self.embeddings = target.get_input_embeddings().weight

    def features(self, text):  # (n,) -> (n, H)
        """What stands for the target's states at each position of `text`, before anything is fed back."""
        states = self.target(text[None], output_hidden_states=True).hidden_states
        if self.ids is None:
            feature = states[-1][0]
        else:
            parts = [states[k][0] for k in self.ids]
            if "fc_norm.0.weight" in self.t:
                parts = [rms(part, self.t[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)]
            feature = torch.cat(parts, dim=-1)
        if "input_norm.weight" in self.t:
            feature = rms(feature, self.t["input_norm.weight"])
        return feature @ self.t["fc.weight"].T if self.eagle3 and "fc.weight" in self.t else feature

    def __call__(self, features, tokens):  # (n, H), (n,) -> (n, V'), (n, H)
        """Logits at each pair, and the features that are fed back."""
        t, x, hidden = self.t, self.embeddings[tokens], features
        for number in range(self.layers):
            at = f"layers.{number}."
            if number:
                other = t.get(f"{at}hidden_norm.weight")  # the same under another name
                inner, residual = rms(hidden, t.get(f"{at}input_layernorm.weight", other)), hidden
            elif self.eagle3:
                normed = rms(features, t[f"{at}hidden_norm.weight"])
                inner = torch.cat([rms(x, t[f"{at}input_layernorm.weight"]), normed], dim=-1)
                residual = normed if self.residual_normed else features
            else:
                if "embedding_layernorm.weight" in t:
                    x = rms(x, t["embedding_layernorm.weight"])
                inner = residual = torch.cat([x, features], -1) @ t["fc.weight"].T + t.get("fc.bias", 0)
                if f"{at}input_layernorm.weight" in t:
                    inner = rms(inner, t[f"{at}input_layernorm.weight"])
            hidden = residual + self.attention(at, inner)
            inner = rms(hidden, t[f"{at}post_attention_layernorm.weight"])
            gate = F.silu(inner @ t[f"{at}mlp.gate_proj.weight"].T) * (inner @ t[f"{at}mlp.up_proj.weight"].T)
            hidden = hidden + gate @ t[f"{at}mlp.down_proj.weight"].T
        last = t.get("norm.weight", t.get("pre_lm_head_layernorm.weight"))
        output = hidden if last is None else rms(hidden, last)
        head = t.get("lm_head.weight", self.target.get_output_embeddings().weight)
        return output @ head.T, output if self.output_normed else hidden

    def attention(self, at, x):
        def projected(name):
            return x @ self.t[f"{at}self_attn.{name}.weight"].T + self.t.get(f"{at}self_attn.{name}.bias", 0)

        places = torch.arange(len(x))
        q, k, v = (projected(name).unflatten(-1, (-1, self.head)) for name in ("q_proj", "k_proj", "v_proj"))
        if f"{at}self_attn.q_norm.weight" in self.t:
            q, k = rms(q, self.t[f"{at}self_attn.q_norm.weight"]), rms(k, self.t[f"{at}self_attn.k_norm.weight"])
        q, k = rotated(q, self.base, places), rotated(k, self.base, places)
        mixed = torch.zeros_like(q)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            for i in range(len(x)):
                seen = slice(max(0, i + 1 - self.window), i + 1)
                mixed[i, head] = (k[seen, group] @ q[i, head] / self.head**0.5).softmax(0) @ v[seen, group]
        return mixed.flatten(1) @ self.t[f"{at}self_attn.o_proj.weight"].T + self.t.get(f"{at}self_attn.o_proj.bias", 0)


def medusa(heads=3, blocks=2, own=True, bias=True, engine=False, known=V):
    """Heads in the layout of their authors, or of an engine (vLLM)."""
    block = "blocks.{}.layers.{}" if engine else "{}.{}.linear"
    names = [block.format(head, number) for head in range(heads) for number in range(blocks)]
    tensors = {f"{name}.weight": drawn(WIDTH, WIDTH) for name in names}
    tensors |= {f"{name}.bias": drawn(WIDTH) for name in names} if bias else {}
    lm_head = "lm_heads.{}.weight" if engine else f"{{}}.{blocks}.weight"
    return tensors | ({lm_head.format(head): drawn(known, WIDTH) for head in range(heads)} if own else {})


def medusa_logits(tensors, hidden, lm_head, blocks=2, head=0):  # (n, H) -> (n, V')
    """One head, by its authors' names."""
    x = hidden
    for number in range(blocks):
        inner = x @ tensors[f"{head}.{number}.linear.weight"].T + tensors.get(f"{head}.{number}.linear.bias", 0)
        x = x + F.silu(inner)
    return x @ tensors.get(f"{head}.{blocks}.weight", lm_head).T


def mlp_speculator(guesses=3, inner=20, tied=False):
    counts = (
        {"emb": 1, "head": 1, "ln": 1, "proj": 2} if tied else dict.fromkeys(("emb", "head", "ln", "proj"), guesses)
    )
    tensors = {f"emb.{i}.weight": drawn(V, inner, scale=1.0) for i in range(counts["emb"])}
    tensors |= {f"head.{i}.weight": drawn(V, inner, scale=1.0) for i in range(counts["head"])}
    tensors |= {f"proj.{i}.weight": drawn(inner, inner if i else WIDTH) for i in range(counts["proj"])}
    for i in range(counts["ln"]):
        tensors |= {f"ln.{i}.weight": norm(inner), f"ln.{i}.bias": drawn(inner)}
    return {f"speculator.{name}": tensor for name, tensor in tensors.items()}


def mlp_logits(tensors, hidden, path, guesses=3, scale_input=False):  # (H,), list of tokens -> (V,)
    """What follows the tokens of a path, from the target's state before them."""
    tensors = {name.removeprefix("speculator."): tensor for name, tensor in tensors.items()}
    state = rms(hidden, eps=1e-6) / 2**0.5 if scale_input else hidden
    inner = tensors["emb.0.weight"].shape[1]
    state_weight = 0.5 ** (0.5 / guesses)
    token_weight = ((1 - state_weight**2) * inner / 2) ** 0.5
    for i, token in enumerate(path):

        def part(name, shared=0, i=i):
            return tensors.get(name.format(i), tensors.get(name.format(shared)))

        state = part("proj.{}.weight", 1) @ state + token_weight / state_weight * part("emb.{}.weight")[token]
        state = F.gelu(rms(state, part("ln.{}.weight"), eps=1e-6) + part("ln.{}.bias"))
    return part("head.{}.weight") @ state


def stepping_target(attention=0.1, step=7):
    """A target of eight layers that mostly says x + 7 after token x, and always without attention; what it says is
    read off its random states, which differ from layer to layer."""
    from support.models import tiny_llama

    target = tiny_llama(V, num_hidden_layers=LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with torch.no_grad():
        for block in target.model.layers:
            block.self_attn.o_proj.weight.mul_(attention)
        states = target.model(torch.arange(V)[:, None]).last_hidden_state[:, 0]
        target.lm_head.weight[(torch.arange(V) + step) % V] = states
    return target
