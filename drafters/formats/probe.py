"""Whether a drafter that others trained predicts this target, tried on a little of the target's own text.

A head with a wrong list of layers, another rotary base, or of another target loads without an error and predicts
nothing. So the target writes some tokens, greedily and from fixed beginnings (but no three tokens twice in a text, as a
loop tells nothing); the drafter is given the true states and tokens before each, and its first guess is compared with
the token that the target would choose. Knows no file.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from ...spec.target.given import cache_name
from ...spec.target.taps import HEAD, Tap, joined, linear_head, listening, put_taps
from ...spec.target.weights import linear_shape
from ..eagle.network import EagleNetwork
from ..eagle.settings import EagleSettings
from .checkpoint import Checkpoint
from .conventions import Convention, Conventions
from .eagle_config import EagleConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..medusa import MedusaHeads
    from .mlp_speculator import MlpSpeculator

BEGINNINGS = (300, 500, 700, 900)  # token ids; low ones are common pieces of words in nearly all vocabularies
TOKENS = 24  # that the target writes after each
_NOTHING = -1e4
SURE = 3.0  # standard errors by which another convention must be better than the declared one


@dataclass(frozen=True)
class OwnText:
    """Rows of the target's own text, R of n + 1 tokens, and what it would say next."""

    tokens: Tensor  # (R, n): x_{t+1} of the pairs that are drafted from
    features: dict[Tap, Tensor]  # (R, n, H) each: the target's states at t
    chosen: Tensor  # (R, n): the target's greedy x_{t+2}


@dataclass(frozen=True)
class Agreement:
    """What guesses had in common with the target's choices."""

    logprobs: Tensor  # (n,): of the target's tokens, of those that the drafter knows
    hits: int
    tried: int
    expected: float  # hits of the same guesses at the same tokens, paired at random

    @property
    def above_chance(self) -> bool:
        """More hits than by a guess that does not look at the text: a head that always says the commonest token has
        no more than expected."""
        spread = (self.expected * (1 - self.expected / self.tried)) ** 0.5
        return self.hits > self.expected + 4 * spread + 2

    def better_than(self, other: "Agreement") -> bool:
        """Surely, not by luck; position for position."""
        gain = self.logprobs - other.logprobs
        return len(gain) > 1 and bool(gain.mean() > SURE * gain.std() / len(gain) ** 0.5) and bool(gain.mean() > 1e-4)


@torch.no_grad()
def own_text(target: "PreTrainedModel", taps: set[Tap]) -> OwnText:
    """Rows of the target's greedy text, with its states at `taps`: one forward per token, then one of the whole."""
    layers: list[Tap] = sorted(tap for tap in taps if tap != HEAD)
    ordered = (*layers, HEAD)
    put_taps(target, ordered)
    vocab_size = linear_shape(linear_head(target))[0]
    config = target.generation_config
    begin = [token for token in (config.bos_token_id,) if isinstance(token, int)]
    rows = [[*begin, token % min(vocab_size, target.config.get_text_config().vocab_size)] for token in BEGINNINGS]
    text, cache, varied = torch.tensor(rows, device=target.device), None, NoRepeatNGramLogitsProcessor(3)
    for _ in range(TOKENS):
        step = text if cache is None else text[:, -1:]
        given: dict[str, Any] = {} if cache is None else {cache_name(): cache}
        output = target(input_ids=step, use_cache=True, **given)
        cache = output.get(cache_name())
        best = varied(text, output.logits[:, -1].float()).argmax(-1)
        text = torch.cat([text, best[:, None]], dim=1)
    with listening() as heard:
        chosen = target(input_ids=text, use_cache=False).logits.argmax(-1)  # (R, T)
    joined(heard, ordered)  # raises where one is missing
    return OwnText(text[:, 1:], {tap: heard[tap][:, :-1] for tap in taps}, chosen[:, 1:])


def agreement(logits: Tensor, chosen: Tensor, index_of_token: Tensor) -> Agreement:
    """Of guesses (R, n, V') at tokens (R, n); `index_of_token` (V,) gives their columns, V' for unknown ones."""
    known = logits.shape[-1]
    columns = index_of_token.to(chosen.device)[chosen]  # (R, n)
    guesses, wanted = logits.argmax(-1).flatten(), columns.flatten()
    inside = wanted < known
    logprobs = logits.float().log_softmax(-1).flatten(0, 1)[inside].gather(1, wanted[inside][:, None])[:, 0]
    logprobs = logprobs.nan_to_num(nan=_NOTHING, neginf=_NOTHING)  # so that what computes nothing is the worst
    counts = [torch.bincount(values, minlength=known + 1).double() for values in (guesses, wanted)]
    expected = float((counts[0] * counts[1])[:known].sum()) / len(wanted)
    return Agreement(logprobs, int((guesses == wanted).sum()), len(wanted), expected)


@torch.no_grad()
def choose(
    network: EagleNetwork, conventions: Conventions, config: EagleConfig, target: "PreTrainedModel"
) -> EagleSettings:
    """The settings by which `network` predicts the target's own text best: the declared ones, unless others are surely
    better, or these do not fit. Raises ValueError where none is better than chance."""
    text = own_text(target, {tap for convention in conventions.tried for tap in convention.settings.taps})
    positions = torch.arange(text.tokens.shape[1], device=target.device).expand_as(text.tokens)

    def tried(convention: Convention) -> Agreement:
        network.adopt(convention.settings)
        features = network.fused(joined(text.features, tuple(convention.settings.taps)))
        logits = network(text.tokens, features, positions).logits
        return agreement(logits, text.chosen, network.index_of_token)

    results = [(convention, tried(convention)) for convention in conventions.tried]
    of_changes = {convention.changes: [] for convention, _ in results}  # fewest first
    for result in results:
        of_changes[result[0].changes].append(result)
    best = [max(of_these, key=lambda result: float(result[1].logprobs.mean())) for of_these in of_changes.values()]
    taken = best[0]
    for other in best[1:]:
        taken = other if other[1].better_than(taken[1]) else taken
    convention, agreed = taken
    _refuse_chance(agreed, config.name, config.verifier(), ", however its layer ids, rope base and residual are read")
    if convention.changes:
        declared, first = conventions.declared, results[0]
        instead = "" if first[0].changes else f" instead of {first[1].hits}"
        print(
            f"drafter {config.name}: by its config it has {declared.against(convention)}; it is read with "
            f"{convention.against(declared)}, and so guesses {agreed.hits} of {agreed.tried} tokens of the target's "
            f"own text{instead}",
            file=sys.stderr,
        )
    return convention.settings


@torch.no_grad()
def check_heads(heads: "MedusaHeads | MlpSpeculator", checkpoint: Checkpoint, target: "PreTrainedModel") -> None:
    """Raise ValueError where the first of `heads` predicts the target's own text no better than chance."""
    text = own_text(target, {HEAD})
    logits = heads.follow(heads.start(text.features[HEAD]), 0, text.tokens[..., None])
    verifier = checkpoint.config().get("base_model_name_or_path")
    agreed = agreement(logits, text.chosen, heads.index_of_token)
    _refuse_chance(agreed, checkpoint.name, verifier if isinstance(verifier, str) else None, "")


def _refuse_chance(agreed: Agreement, name: str, verifier: str | None, how: str) -> None:
    if agreed.above_chance:
        return
    named = f", and its config names {verifier}" if verifier else ""
    raise ValueError(
        f"drafter {name} guesses {agreed.hits} of {agreed.tried} tokens of this target's own text, no more than by "
        f"chance{how}: it was made for another target{named}, or is untrained; use a drafter made for this one"
    )
