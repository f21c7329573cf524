"""EAGLE networks, exported for an engine and held to what the engine computes."""

import json

import torch
from formats.engine_reader import Reader
from paceline.drafters.formats.engines import ENGINES
from paceline.drafters.formats.export_eagle import eagle_export
from paceline.drafters.formats.export_order import Order
from paceline.spec.target.taps import hidden_states, listening, put_taps
from safetensors.torch import load_file

from support.models import random_eagle

LAYER = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
EAGLE3 = dict(taps=(1, 2, 3), wide=True)
EAGLE1 = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}  # what each engine registers


def network_of(target, known=None, layer=(), **settings):
    """A network whose every number is random, those of the target apart, which knows `known` tokens."""
    torch.manual_seed(3)
    vocabulary = None if known is None else torch.randperm(61)[:known].sort().values
    return random_eagle(target, vocabulary, {**LAYER, **dict(layer)}, **settings)


def order_to(engine, target, name="someone/target"):
    return Order("mine", "mine", None, target, name, None, ENGINES[engine])


def exported(network, target, engine, folder, tokens=3):
    """Config and tensors that were written."""
    folder.mkdir(exist_ok=True)
    export = eagle_export(order_to(engine, target), network)
    export.write(folder, tokens)
    export.check(folder)
    return stored(folder)


def stored(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def expected(network, target, text):
    """Logits (T, V) of the network, -inf for tokens that it does not know, and features (T, H), by our own taps."""
    taps = tuple(network.settings.taps)
    positions = torch.arange(len(text))[None]
    heard = hidden_states(target, taps, text[None], positions)
    features = network.fused(torch.cat([heard[tap] for tap in taps], -1))[:, :-1]
    put_taps(network, (network.feedback,))
    with listening() as states:
        logits = network(text[None, 1:], features, positions[:, :-1]).logits[0]
    whole = logits.new_full((len(logits), network.vocab_size), -torch.inf)
    whole[:, network.vocabulary] = logits
    return whole, states[network.feedback][0]


def assert_same(network, target, engine, config, tensors):
    torch.manual_seed(5)
    text = torch.randint(1, 61, (40,))
    ours, feature = expected(network, target, text)
    last = []
    hook = target.model.layers[-1].register_forward_hook(lambda *call: last.append(call[-1]))
    with torch.no_grad():
        out = target(text[None], output_hidden_states=True)
    hook.remove()
    states = {number: state[0, :-1] for number, state in enumerate(out.hidden_states)}
    states["head"] = states[6]  # transformers puts the last one through the final norm, and engines do not
    states[6] = last[0][0, :-1]
    reader = Reader(engine, config, tensors, target)
    if config["architectures"] == [EAGLE1[engine]]:
        theirs, fed = reader.eagle1(text[1:], states["head"])
        known = network.vocabulary
        torch.testing.assert_close(theirs[:, known], ours[:, known], rtol=1e-5, atol=1e-5)
    else:
        theirs, fed = reader.eagle3(text[1:], reader.fused(states))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fed, feature, rtol=1e-5, atol=1e-5)
    reader.check_keys()
    return reader
