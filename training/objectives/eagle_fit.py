"""An EAGLE network that begins as layers of the target, with all that comes before them fitted by ridge regression.

In a short training nothing matters more. The layers are copies; `join` is fitted from embedding and feature onto the
state that the target itself has under these layers, one token further; `fuse` onto what the network will feed back,
which stands in for what is fused. Wide layers, which have no `join`, get attention's projections behind a fit onto its
normalised input. Knows nothing of training.
"""

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafters.eagle.network import EagleNetwork
from ...drafters.eagle.settings import EagleSettings
from ...spec.target.taps import HEAD, Tap, hidden_states, joined, layer_stacks
from ...spec.target.weights import dense_state

_PAIRS = 8  # for each number that is fitted from
_CHUNK = 4096  # pairs at a time
_RIDGE = 1e-4  # of the mean square of the numbers that are fitted from
_CHECKED = 64  # tokens of text on which copied layers are compared
_WRONG = 0.2  # relative error of what the copied layers add to the states; rounding to 16 bits makes a few per cent
_NO_DATA = "objective.layer_of_target fits the network to data, and there are none; leave it out"


class _Pairs(NamedTuple):
    """P pairs of text positions t and t + 1, and what the target has there."""

    tokens: Tensor  # (P,): at t + 1
    features: Tensor  # (P, F): at t, at the taps of the network
    fed_back: Tensor  # (P, H): at t, at the tap that corresponds to what the network feeds back
    before: Tensor  # (P, H): at t + 1, under the layers


@torch.no_grad()
def begin_as_target(network: EagleNetwork, target, number: int, rows: Iterable[dict]) -> float:
    """Copy the target's layers `number`, ... and its final norm, and fit the rest to `rows` of data, to as many as that
    takes. Returns R2 of the fit under the layers, and says it.

    Raises ValueError for layers of another kind, and without data."""
    count, layers = target.config.get_text_config().num_hidden_layers, network.config.num_hidden_layers
    settings = network.settings
    if not settings.final_norm or not settings.input_norm:
        raise ValueError("objective.layer_of_target needs the norms of the target's layers; choose another layout")
    if not 1 <= number <= count - layers:
        raise ValueError(
            f"objective.layer_of_target is {number} and must be from 1 to {count - layers}, as the target has {count} "
            f"layers and {layers} are copied"
        )
    prefix, dtype = layer_stacks(target)[0], network.norm.weight.dtype
    state = dense_state(target)
    copied = _copied(network, target, state, prefix, number)
    _check(network, copied, target, number, rows)
    if (norm := state.get(f"{prefix.removesuffix('layers')}norm.weight")) is not None:
        network.norm.weight.copy_(norm)
    pairs = _pairs(network, target, number, rows)
    if isinstance(network.fuse, nn.Linear):
        weight, _, _ = _ridge(lambda part: network.normed(pairs.features[part].to(dtype)), pairs.fed_back)
        network.fuse.weight.copy_(weight)

    def inputs(part: slice) -> Tensor:
        return network.inputs(pairs.tokens[part], network.fused(pairs.features[part].to(dtype)))

    if settings.wide:
        weight, _, share = _ridge(inputs, copied[0].input_layernorm(pairs.before.to(dtype)))
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(copied[0].self_attn, name)
            projection.weight = nn.Parameter(projection.weight @ weight)
        del copied[0].input_layernorm
    else:
        weight, bias, share = _ridge(inputs, pairs.before, settings.join_bias)
        network.join.weight.copy_(weight)
        if bias is not None:
            network.join.bias.copy_(bias)
    network.layers.load_state_dict(copied.state_dict(), strict=False)
    if PartialState().is_main_process:
        print(f"begins as layer {number} of the target; R2 of the state under it: {share:.2f}", file=sys.stderr)
    return share


def _copied(network: EagleNetwork, target, state: dict[str, Tensor], prefix: str, number: int) -> nn.ModuleList:
    """The target's layers `number`, ... as plain layers of the network's family."""
    plain, name = EagleNetwork(EagleSettings(layer=network.settings.layer), target), type(target).__name__
    tensors = {
        f"{layer}.{key.removeprefix(start)}": tensor
        for layer in range(len(plain.layers))
        for key, tensor in state.items()
        if key.startswith(start := f"{prefix}.{number + layer}.")
    }
    expected = plain.layers.state_dict()
    for key in sorted(tensors.keys() ^ expected.keys()):
        if key in tensors or not key.endswith(".bias"):
            raise ValueError(
                f"layers of {name} {'have' if key in tensors else 'lack'} {key.partition('.')[2]}, unlike those of "
                f"{network.config.model_type}; leave objective.layer_of_target out"
            )
        tensors[key] = torch.zeros_like(expected[key])
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key.partition('.')[2]} of {name} is of shape {list(tensor.shape)} and the network's of "
                f"{list(expected[key].shape)}; leave its sizes out of objective.layer"
            )
    plain.layers.load_state_dict(tensors)
    return plain.layers


def _check(network: EagleNetwork, copied: nn.ModuleList, target, number: int, rows: Iterable[dict]) -> None:
    """Raise ValueError unless the layers compute on text what those of the target do. The first token is left out:
    whatever the text, states there are huge in many models, and would hide what differs elsewhere."""
    row = next(iter(rows), None)
    if row is None:
        raise ValueError(_NO_DATA)
    ids = torch.as_tensor(row["input_ids"], device=target.device).long()[None, :_CHECKED]  # (1, T)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    heard = hidden_states(target, (number - 1, number + len(copied) - 1), ids, positions)
    before, after = (states.to(next(copied.parameters()).dtype) for states in heard.values())
    mask = before.new_full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
    hidden, rotary = before, network.rotary_emb(before, positions)
    for layer in copied:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    error = float((hidden - after)[:, 1:].norm() / (after - before)[:, 1:].norm())
    if not error < _WRONG:
        raise ValueError(
            f"layers of {type(target).__name__} compute something else than those of {network.config.model_type} with "
            f"the same weights (relative error {error:.2g}); leave objective.layer_of_target out"
        )


def _pairs(network: EagleNetwork, target, number: int, rows: Iterable[dict]) -> _Pairs:
    settings = network.settings
    fed_back: Tap = HEAD if settings.norm_output else number + network.config.num_hidden_layers - 1
    taps = tuple(dict.fromkeys((*settings.taps, HEAD, fed_back, number - 1)))
    wanted = _PAIRS * (network.embeddings.shape[1] + network.config.hidden_size)
    parts: list[_Pairs] = []
    for row in rows:
        ids = torch.as_tensor(row["input_ids"], device=target.device).long()  # (T,)
        positions = torch.as_tensor(row["position_ids"], device=target.device).long()
        first = (torch.as_tensor(row["document"], device=target.device)[:-1] >= 0) & (positions[1:] > 0)  # of a pair
        heard = {tap: states[0] for tap, states in hidden_states(target, taps, ids[None], positions[None]).items()}
        features, further = joined(heard, settings.taps)[:-1], heard[number - 1][1:]
        parts.append(_Pairs(ids[1:][first], features[first], heard[fed_back][:-1][first], further[first]))
        if sum(len(part.tokens) for part in parts) >= wanted:
            break
    if not parts:
        raise ValueError(_NO_DATA)
    return _Pairs(*map(torch.cat, zip(*parts)))


def _ridge(
    inputs: Callable[[slice], Tensor], wanted: Tensor, with_bias: bool = False
) -> tuple[Tensor, Tensor | None, float]:
    """Weight (M, K), bias (M,) and R2 of the ridge regression from `inputs`, (n, K) of a slice, to `wanted` (P, M)."""
    dtype = torch.float32 if wanted.device.type == "mps" else torch.float64

    def both(part: slice) -> tuple[Tensor, Tensor]:
        given = inputs(part).to(dtype)
        return F.pad(given, (0, 1), value=1.0) if with_bias else given, wanted[part].to(dtype)

    squares = products = total = 0
    parts = [slice(start, start + _CHUNK) for start in range(0, len(wanted), _CHUNK)]
    for part in parts:
        given, goal = both(part)
        squares, products, total = squares + given.T @ given, products + given.T @ goal, total + goal.sum(0)
    mean = total / len(wanted)
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    weight = torch.linalg.solve(squares, products)  # (K, M)
    missed, spread = 0.0, 0.0
    for part in parts:
        given, goal = both(part)
        missed += float((goal - given @ weight).square().sum())
        spread += float((goal - mean).square().sum())
    weight = weight.T.float()
    share = 1 - missed / max(spread, 1e-12)
    return (weight[:, :-1], weight[:, -1], share) if with_bias else (weight, None, share)
