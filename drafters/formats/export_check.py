"""What was exported is read again, and gives the logits that the drafter gives. Knows no engine."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...spec.console import quietly
from ...spec.target.taps import HEAD, listening, put_taps
from ..medusa import MedusaHeads
from .checkpoint import open_checkpoints
from .eagle import EagleFile
from .medusa import load_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..eagle.network import EagleNetwork

WIDTH = 8  # positions that are compared
_REPORT = "that is an error of Paceline's, so please report it"


def check_eagle(folder: Path, network: "EagleNetwork", target: "PreTrainedModel") -> None:
    """By the reader of published heads: the same layers of the target, and logits and features to feed back."""
    file = EagleFile(open_checkpoints(folder)[0], target)
    ids = sorted(tap + 1 for tap in network.settings.taps if tap != HEAD)
    if any(given != ids for given in file.config.layer_ids()[:1]):  # the next is for SGLang, which counts by target
        raise ValueError(f"{folder.name} does not name the layers that the drafter reads, {ids}; {_REPORT}")
    read, _ = file.network()  # as the config says
    known = network.vocabulary if network.trimmed and not read.trimmed else slice(None)
    if read.trimmed and not torch.equal(read.vocabulary, network.vocabulary):
        raise ValueError(f"{folder.name} does not name the tokens that the drafter knows; {_REPORT}")
    features = _states(sum(network.tap_sizes), network.lm_head.weight)  # of the taps in ascending order
    states = features.split(network.tap_sizes, dim=-1)
    places = sorted(range(len(states)), key=network.settings.taps.__getitem__) if len(states) > 1 else [0]
    given = torch.cat([states[places.index(number)] for number in range(len(states))], dim=-1)
    logits, fed = _drafted(read, features, network.vocabulary)
    expected, feature = _drafted(network, given, network.vocabulary)
    _compare(folder, logits[..., known], expected)
    _compare(folder, fed, feature)


@torch.no_grad()
def _drafted(network: "EagleNetwork", features: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features to feed back, after features (1, WIDTH, F) and some of the `known` tokens."""
    positions = torch.arange(WIDTH, device=known.device)
    put_taps(network, (network.feedback,))
    with listening() as heard:
        logits = network(known[positions % len(known)][None], network.fused(features), positions[None]).logits
    return logits, heard[network.feedback]


def check_heads(folder: Path, heads: MedusaHeads, target: "PreTrainedModel") -> None:
    """By the reader of published heads."""
    read = load_heads(open_checkpoints(folder)[0], target)
    known = heads.vocabulary if heads.trimmed else slice(None)
    states = _states(heads.hidden_size, heads.weight)
    with torch.no_grad():
        (logits,), (expected,) = read.start(states), heads.start(states)  # (1, WIDTH, K, V') each
    _compare(folder, logits[..., known], expected)


def check_draft_lm(folder: Path, model: "PreTrainedModel") -> None:
    """By transformers' own reader."""
    from transformers import AutoModelForCausalLM

    with quietly():
        read, report = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    absent = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]}))
    if absent:
        raise ValueError(f"{folder.name} and its config disagree about {absent[0]}; {_REPORT}")
    ids = torch.arange(WIDTH, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        _compare(folder, read.to(model.device).eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def _states(size: int, like: Tensor) -> Tensor:  # (1, WIDTH, size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, WIDTH, size, generator=generator).to(like)


def _compare(folder: Path, read: Tensor, expected: Tensor) -> None:
    """Raise ValueError where two results differ by more than rounding."""
    share = 1e-4 if expected.dtype == torch.float32 else 2e-2  # of the largest number
    apart = (read.float() - expected.float()).abs().max().item()
    if not apart <= share * expected.float().abs().max().item():
        raise ValueError(
            f"{folder.name} does not give the drafter's logits when it is read again (they differ by {apart:.3g}); "
            f"{_REPORT}"
        )
