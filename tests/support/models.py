"""Tiny random models, drafters fitted to them, and what the frozen target sees of a batch."""

from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocab=61, seed=0, **options):
    """A random Llama of two layers in float32; `pad` is token 0, there is no end of text by default."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def noisy_copy(model, noise=0.02, seed=1):
    """A draft model that mostly agrees with `model`."""
    torch.manual_seed(seed)
    copy = type(model)(model.config).eval()
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters()):
            mine.copy_(theirs + noise * torch.randn_like(theirs))
    return copy


def target_view(model, input_ids):
    """What the frozen target sees on rows (B, T) of one document each."""
    from paceline.spec.target.taps import HEAD, listening, put_taps
    from paceline.training.objectives.objective import TargetView

    put_taps(model, (HEAD,))
    with torch.no_grad(), listening() as heard:
        model(input_ids=input_ids, use_cache=False)
    return TargetView(heard, model.get_output_embeddings())


def whole_rows(input_ids):
    """A batch of rows that are one document each, all of it the target's own."""
    ones = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "loss_mask": ones, "document": ones * 0, "position_ids": ones.cumsum(1) - 1}


def fitted_heads(model, mode, steps=40, known=None, seed=0, **settings):
    """Heads of three levels that have learned a little of the model's own text: right now and then."""
    from paceline.drafters.head_settings import HeadSettings
    from paceline.drafters.medusa import MedusaHeads
    from paceline.training.objectives.heads import MedusaObjective
    from paceline.training.objectives.known_tokens import frequent_tokens

    torch.manual_seed(seed)
    vocab = model.config.vocab_size
    options = dict(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, max_new_tokens=40)
    text = model.generate(torch.randint(1, vocab, (16, 4)), **options)
    batch, seen = whole_rows(text), target_view(model, text)
    vocabulary = known and frequent_tokens([batch], known, vocab)
    objective = MedusaObjective(
        MedusaHeads.make(HeadSettings(mode, **{"heads": 3, "rank": 8, **settings}), model, vocabulary), 1.0, 0.5
    )
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(steps):
        losses = objective(batch, seen)
        (losses.total / losses.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.heads.requires_grad_(False).to(model.dtype)


@contextmanager
def as_traced(*models):
    """Linear layers of `models` compute as they do where a compiler traces them."""
    from paceline.spec.kernels.linears import Packing

    with pytest.MonkeyPatch.context() as patch, Packing(models):
        patch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        yield


@torch.no_grad()
def random_eagle(model, known=None, layer=None, seed=0, **settings):
    """An EAGLE network of random weights, norms included."""
    from paceline.drafters.eagle.network import EagleNetwork
    from paceline.drafters.eagle.settings import EagleSettings

    torch.manual_seed(seed)
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **(layer or {})}
    network = EagleNetwork(EagleSettings(sizes, **settings), model, known)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.requires_grad_(False).eval().to(model.dtype)


@torch.no_grad()
def eagle_copy(model, noise=0.02, known=None, seed=1):
    """An EAGLE network that mostly agrees with the Llama `model`: its layers behind a `join` that passes embeddings on,
    and features a little."""
    sizes = {name: getattr(model.config, name) for name in ("num_hidden_layers", "rms_norm_eps", "rope_parameters")}
    network = random_eagle(model, known, sizes, seed, norm_output=True)
    network.layers.load_state_dict(model.model.layers.state_dict())
    network.norm.load_state_dict(model.model.norm.state_dict())
    for parameter in network.layers.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    size = model.config.hidden_size
    network.join.weight.copy_(torch.cat([torch.eye(size), 0.2 * noise * torch.randn(size, size)], dim=1))
    return network


@torch.no_grad()
def eagle_features(model, taps, input_ids):
    """The hidden states (B, T, F) at `taps`, below the last layer by transformers' own names of them."""
    from paceline.spec.target.taps import HEAD, listening, put_taps

    put_taps(model, (HEAD,))
    with listening() as heard:
        states = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([heard[HEAD] if tap == HEAD else states[tap + 1] for tap in taps], dim=-1)
