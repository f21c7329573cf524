"""The ways in which a published EAGLE head may be meant to be read, where its tensors do not tell: layer ids that count
from one more or less, rotary frequencies, and the residual of its first layer. Knows nothing of how good they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ...spec.target.taps import HEAD, Tap, feature_sizes
from ..eagle.network import rotary_embedding
from ..eagle.settings import EagleSettings
from .eagle_config import BASE, EagleConfig, default_ids, spread_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Convention:
    """One way to read a head."""

    settings: EagleSettings
    taps: str  # in words, as are the others
    rope: str
    residual: str
    changes: int  # of these, against what the config says

    def against(self, other: "Convention") -> str:
        """What is not as in `other`, in words."""
        mine, given = ((one.taps, one.rope, one.residual) for one in (self, other))
        return ", ".join(word for word, otherwise in zip(mine, given) if word != otherwise)


@dataclass(frozen=True)
class Conventions:
    """What the config declares, and all plausible conventions by which the target can be read: first the declared one,
    where that is among them, then those that differ in little."""

    declared: Convention
    tried: list[Convention]


def candidates(config: EagleConfig, settings: EagleSettings, target: "PreTrainedModel") -> Conventions:
    """The conventions to try; of the taps in `settings` the number is right. Raises ValueError where no list of layers
    fits the target."""
    declared_taps, why, taps = _taps(config, settings, target)
    ropes = _ropes(config, settings.layer, target)
    flag = bool(config.flag("norm_before_residual")) and settings.wide

    def made(tap: tuple[Tap, ...], rope: dict[str, Any], residual: bool) -> Convention:
        layer = {**settings.layer, "rope_parameters": rope}
        kind = "" if rope["rope_type"] == "default" else f" ({rope['rope_type']})"
        return Convention(
            replace(settings, taps=tap, norm_before_residual=residual, layer=layer),
            f"hidden states {_ids(tap, target)}", f"rope base {rope['rope_theta']:g}{kind}",
            f"norm_before_residual={str(residual).lower()}",
            sum((tap != declared_taps, rope != ropes[0], residual != flag)),
        )  # fmt: skip

    tried = [made(*parts) for parts in product(taps, ropes, [flag, not flag] if settings.wide else [flag])]
    declared = tried[0] if why is None else replace(tried[0], taps=why)
    return Conventions(declared, sorted(tried, key=lambda convention: convention.changes))


def _taps(
    config: EagleConfig, settings: EagleSettings, target: "PreTrainedModel"
) -> tuple[tuple[Tap, ...] | None, str | None, list[tuple[Tap, ...]]]:
    """The declared taps, or None and why these do not fit, in words; and all that are plausible."""
    count, layers = len(settings.taps), target.config.get_text_config().num_hidden_layers
    if not settings.fuse:  # no map from several states, so it reads the last one
        return (HEAD,), None, [(HEAD,)]
    every, default = config.layer_ids(), default_ids(count, layers)
    declared = [ids for ids in every if len(ids) == count]
    shifted = [[number + shift for number in ids] for shift in (1, -1) for ids in declared or [default]]
    spread = [spread_ids(count, layers)] if count > 1 else []
    lists = [*declared, *(shifted if declared else [default, *shifted]), default, *spread]
    fitting = [_sorted(ids, layers) for ids in lists if _misfit(ids, count, target) is None]
    if not fitting:
        said = f"names layers {declared[0]}" if declared else f"reads {count} layers"
        raise ValueError(
            f"drafter {config.name} {said}, and this target has {layers}; use a drafter made for this target"
        )
    why = _misfit(every[0], count, target) if every else None
    words = None if why is None else f"hidden states {every[0]} ({why})"
    return None if why else fitting[0], words, list(dict.fromkeys(fitting))


def _misfit(ids: list[int], count: int, target: "PreTrainedModel") -> str | None:
    """Why `count` features of the target cannot be these hidden states; None where they can."""
    layers = target.config.get_text_config().num_hidden_layers
    if len(ids) != count:
        return f"its fc reads {count}"
    if len(set(ids)) < count:
        return "one of them twice"
    if 0 in ids:
        return "0 are the embeddings, which are not read"
    if not all(0 < number <= layers for number in ids):
        return f"this target has {layers} layers"
    sizes = feature_sizes(target, _sorted(ids, layers))
    return None if sum(sizes) == count * feature_sizes(target, (0,))[0] else "they are of other widths"


def _sorted(ids: list[int], layers: int) -> tuple[Tap, ...]:
    return tuple(_tap(number, layers) for number in sorted(ids))


def _tap(number: int, layers: int) -> Tap:
    """The tap of `hidden_states[number]`, whose last one comes after the final norm."""
    return HEAD if number == layers else number - 1


def _ids(taps: tuple[Tap, ...], target: "PreTrainedModel") -> list[int]:
    layers = target.config.get_text_config().num_hidden_layers
    return [layers if tap == HEAD else tap + 1 for tap in taps]


def _ropes(config: EagleConfig, layer: dict[str, Any], target: "PreTrainedModel") -> list[dict[str, Any]]:
    """The frequencies that the config declares, those of EAGLE-3's own heads, and the target's, where these fit the
    attention heads. Raises ValueError where the declared ones do not."""
    declared = layer["rope_parameters"]
    others = getattr(target.config.get_text_config(), "rope_parameters", None)
    ropes = [declared, {"rope_type": "default", "rope_theta": BASE}]
    if isinstance(others, dict) and others.get("rope_theta") and others.get("partial_rotary_factor", 1) == 1:
        plain = {name: value for name, value in others.items() if name != "partial_rotary_factor"}
        ropes.append({"rope_type": "default", **plain})
    fitting = []
    for rope in ropes:
        try:
            with _no_warnings():
                rotary_embedding({**layer, "rope_parameters": rope})
        except ValueError as error:
            if rope is declared:
                raise ValueError(f"drafter {config.name}: no network can be made of its config ({error})") from error
        else:
            fitting += [] if rope in fitting else [rope]
    return fitting


@contextmanager
def _no_warnings() -> Iterator[None]:
    """transformers warns of nothing in the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
