"""Whether a drafter that others trained predicts this target, tried on a little of the target's own text.

A head with a wrong list of layers, another rotary base, or of another target loads without an error and predicts
nothing. So the target writes some tokens, greedily and from fixed beginnings (but no three tokens twice in a text, as a
loop tells nothing); the drafter is given the true states and tokens before each, and its first guess is compared with
the token that the target would choose. Knows no file.
"""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from ...spec.target.given import cache_name
from ...spec.target.load import context_length
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

BEGINNINGS = range(300, 1900, 50)  # token ids; low ones are common pieces of words in nearly all vocabularies
TOKENS = 24  # that the target writes after each
ROWS = 4  # that are enough to compare layers and residuals; all of them tell rotary frequencies and chance
_NOTHING = -1e4
SURE = 3.0  # standard errors by which another convention must be better than the declared one


@dataclass(frozen=True)
class OwnText:
    """Rows of the target's own text, R of n + 1 tokens, and what it would say next."""

    tokens: Tensor  # (R, n): x_{t+1} of the pairs that are drafted from
    features: dict[Tap, Tensor]  # (R, n, H) each: the target's states at t
    chosen: Tensor  # (R, n): the target's greedy x_{t+2}

    def first(self, rows: int) -> "OwnText":
        features = {tap: states[:rows] for tap, states in self.features.items()}
        return OwnText(self.tokens[:rows], features, self.chosen[:rows])


@dataclass(frozen=True)
class Agreement:
    """What guesses had in common with the target's choices, at the tokens that the drafter knows."""

    logprobs: Tensor  # (n,): of the target's tokens
    right: Tensor  # (n,) bool
    expected: float  # hits of the same guesses at the same tokens, paired at random

    @property
    def hits(self) -> int:
        return int(self.right.sum())

    @property
    def tried(self) -> int:
        return len(self.right)

    def above_chance(self, control: "Agreement") -> bool:
        """More hits than the same drafter has with states of other texts, `control`, which is what it knows of tokens
        without this target. One that needs no states may have half of all, and more than who says the commonest."""
        spread = (self.expected * (1 - self.expected / max(self.tried, 1))) ** 0.5
        if 2 * self.hits > self.tried and self.hits > self.expected + 4 * spread + 2:
            return True
        gained, lost = int((self.right & ~control.right).sum()), int((control.right & ~self.right).sum())
        return gained - lost > 4 * (gained + lost) ** 0.5 + 2

    def better_than(self, other: "Agreement") -> bool:
        """Surely, not by luck; position for position."""
        gain = self.logprobs - other.logprobs
        return len(gain) > 1 and bool(gain.mean() > SURE * gain.std() / len(gain) ** 0.5) and bool(gain.mean() > 1e-4)


@torch.no_grad()
def own_text(target: "PreTrainedModel", taps: set[Tap]) -> OwnText:
    """Rows of the target's greedy text, with its states at `taps`: one forward per token."""
    layers: list[Tap] = sorted(tap for tap in taps if tap != HEAD)
    ordered = (*layers, HEAD)
    put_taps(target, ordered)
    vocab_size = linear_shape(linear_head(target))[0]
    config = target.generation_config
    begin = [token for token in (config.bos_token_id,) if isinstance(token, int)]
    rows = [[*begin, token % min(vocab_size, target.config.get_text_config().vocab_size)] for token in BEGINNINGS]
    text, cache, varied = torch.tensor(rows, device=target.device), None, NoRepeatNGramLogitsProcessor(3)
    states: dict[Tap, list[Tensor]] = {tap: [] for tap in ordered}
    chosen = []
    for number in range(TOKENS + 1):
        step = text if cache is None else text[:, -1:]
        given: dict[str, Any] = {} if cache is None else {cache_name(): cache}
        with listening() as heard:
            output = target(input_ids=step, use_cache=True, **given)
        joined(heard, ordered)  # raises where one is missing
        for tap, parts in states.items():
            parts.append(heard[tap])
        cache = output.get(cache_name())
        chosen.append(output.logits.argmax(-1))
        if number < TOKENS:
            best = varied(text, output.logits[:, -1].float()).argmax(-1)
            text = torch.cat([text, best[:, None]], dim=1)
    features = {tap: torch.cat(states[tap], dim=1)[:, :-1] for tap in taps}
    return OwnText(text[:, 1:], features, torch.cat(chosen, dim=1)[:, 1:])


@torch.no_grad()
def one_text(target: "PreTrainedModel", rows: OwnText) -> OwnText:
    """The tokens of all rows as one text, as far as the target's context goes."""
    taps: tuple[Tap, ...] = tuple(rows.features)
    put_taps(target, taps)
    text = rows.tokens.reshape(1, -1)[:, : context_length(target)]
    with listening() as heard:
        chosen = target(input_ids=text, use_cache=False).logits.argmax(-1)
    return OwnText(text[:, 1:], {tap: heard[tap][:, :-1] for tap in taps}, chosen[:, 1:])


def agreement(logits: Tensor, chosen: Tensor, index_of_token: Tensor) -> Agreement:
    """Of guesses (R, n, V') at tokens (R, n); `index_of_token` (V,) gives their columns, V' for unknown ones."""
    known = logits.shape[-1]
    wanted = index_of_token.to(chosen.device)[chosen].flatten()  # (R * n,)
    inside = wanted < known
    logits, wanted = logits.flatten(0, 1)[inside], wanted[inside]
    guesses = logits.argmax(-1)
    logprobs = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    logprobs = logprobs.nan_to_num(nan=_NOTHING, neginf=_NOTHING)  # so that what computes nothing is the worst
    counts = [torch.bincount(values, minlength=known).double() for values in (guesses, wanted)]
    expected = float((counts[0] * counts[1]).sum()) / max(len(wanted), 1)
    return Agreement(logprobs, guesses == wanted, expected)


def _judged(network: EagleNetwork, convention: Convention, text: OwnText, shift: int = 0) -> Agreement:
    """How `network` guesses `text` by a convention; with the states of rows that are `shift` further."""
    network.adopt(convention.settings)
    features = network.fused(joined(text.features, tuple(convention.settings.taps))).roll(shift, 0)
    positions = torch.arange(text.tokens.shape[1], device=features.device).expand_as(text.tokens)
    return agreement(network(text.tokens, features, positions).logits, text.chosen, network.index_of_token)


def _best(network: EagleNetwork, conventions: list[Convention], *texts: OwnText) -> Convention:
    """Of those with the fewest changes the best; another one if it is surely better, fewer changes first."""

    def judged(convention: Convention) -> Agreement:
        each = [_judged(network, convention, text) for text in texts]
        logprobs, right = (torch.cat([getattr(one, name) for one in each]) for name in ("logprobs", "right"))
        return Agreement(logprobs, right, sum(one.expected for one in each))

    results: dict[int, list[tuple[Convention, Agreement]]] = {}
    for each in conventions:
        results.setdefault(each.changes, []).append((each, judged(each)))
    best = [max(results[n], key=lambda result: float(result[1].logprobs.mean())) for n in sorted(results)]
    taken = best[0]
    for other in best[1:]:
        taken = other if other[1].better_than(taken[1]) else taken
    return taken[0]


@torch.no_grad()
def choose(
    network: EagleNetwork, conventions: Conventions, config: EagleConfig, target: "PreTrainedModel"
) -> EagleSettings:
    """The settings by which `network` predicts the target's own text best: the declared ones, unless others are surely
    better, or these do not fit. Raises ValueError where none is better than chance."""
    text = own_text(target, {tap for convention in conventions.tried for tap in convention.settings.taps})
    taken = _best(network, conventions.tried, text.first(ROWS))
    ropes = [each for each in conventions.tried if (each.taps, each.residual) == (taken.taps, taken.residual)]
    if len(ropes) > 1:  # which few tokens hardly tell: some wrong ones show in short texts, others in long ones
        others = [replace(each, changes=int(each is not taken)) for each in ropes]
        best = _best(network, others, text, one_text(target, text))
        taken = next(each for each in ropes if each.settings == best.settings)
    agreed = _judged(network, taken, text)
    how = ", however its layer ids, rope base and residual are read"
    _refuse_chance(agreed, _judged(network, taken, text, 1), config.name, config.verifier(), how)
    if taken.changes:
        declared, first = conventions.declared, conventions.tried[0]
        instead = "" if first.changes else f" instead of {_judged(network, first, text).hits}"
        print(
            f"drafter {config.name}: by its config it has {declared.against(taken)}; it is read with "
            f"{taken.against(declared)}, and so guesses {agreed.hits} of {agreed.tried} tokens of the target's own "
            f"text{instead}",
            file=sys.stderr,
        )
    return taken.settings


@torch.no_grad()
def check_heads(heads: "MedusaHeads | MlpSpeculator", checkpoint: Checkpoint, target: "PreTrainedModel") -> None:
    """Raise ValueError where the first of `heads` predicts the target's own text no better than chance."""
    text = own_text(target, {HEAD})
    agreed, control = (
        agreement(heads.follow(heads.start(states), 0, text.tokens[..., None]), text.chosen, heads.index_of_token)
        for states in (text.features[HEAD], text.features[HEAD].roll(1, 0))
    )
    verifier = checkpoint.config().get("base_model_name_or_path")
    _refuse_chance(agreed, control, checkpoint.name, verifier if isinstance(verifier, str) else None, "")


def _refuse_chance(agreed: Agreement, control: Agreement, name: str, verifier: str | None, how: str) -> None:
    if agreed.above_chance(control):
        return
    named = f", and its config names {verifier}" if verifier else ""
    raise ValueError(
        f"drafter {name} guesses {agreed.hits} of {agreed.tried} tokens of this target's own text, no more than by "
        f"chance{how}: it was made for another target{named}, or is untrained; use a drafter made for this one"
    )
