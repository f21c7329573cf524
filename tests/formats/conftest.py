"""A head that has learned the text of a small target."""

from types import SimpleNamespace

import pytest
import torch
from formats.published import V, config_of, stepping_target, write
from torch.nn import functional as F

TAPS = (1, 3, 6)  # hidden states 2, 4 and 7


@pytest.fixture(scope="session")
def learned():
    """The target, and a function that writes its head with a config of the test's own."""
    from paceline.drafters.eagle.network import EagleNetwork
    from paceline.drafters.eagle.settings import EagleSettings
    from paceline.drafters.formats.eagle_names import offsets_of, published_name
    from paceline.spec.target.taps import joined, listening, put_taps

    target = stepping_target()
    layer = {**config_of(head_dim=8), "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    torch.manual_seed(0)
    known = torch.arange(1, V)  # one token is not known
    network = EagleNetwork(
        EagleSettings(layer, TAPS, wide=True, fuse=True, norm_before_residual=True, own_head=True), target, known
    )
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2:  # attention that looks at few pairs depends on rotary frequencies
                sharp = 4 if "q_proj" in name or "k_proj" in name else 2 if "o_proj" in name else 1
                weight.normal_(std=sharp * weight.shape[1] ** -0.5)
        starts = torch.stack([torch.ones(V, dtype=torch.int64), torch.arange(V)], dim=1)
        text = target.generate(
            starts, attention_mask=torch.ones_like(starts), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        put_taps(target, TAPS)
        with listening() as heard:
            chosen = network.index_of_token[target(text).logits.argmax(-1)][:, 1:]
        features = joined(heard, TAPS)[:, :-1]
    places = torch.arange(text.shape[1] - 1).expand(len(text), -1)
    optimizer = torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(60):
        logits = network(text[:, 1:], network.fused(features), places).logits
        F.cross_entropy(logits.flatten(0, 1), chosen.flatten(), ignore_index=V - 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = network.requires_grad_(False).stored()
    vocabulary = stored.pop("vocabulary")
    tensors = {published_name(name, True): tensor for name, tensor in stored.items()} | offsets_of(vocabulary, V)

    def save(folder, **config):
        return write(folder, tensors, config_of(**config))

    return SimpleNamespace(target=target, save=save, network=network, text=text, tensors=tensors)
