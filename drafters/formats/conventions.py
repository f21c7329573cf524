"""The ways in which a published EAGLE head may be meant to be read, where its tensors do not tell: layer ids that count
from one more or less, rotary frequencies, and the residual of its first layer. Knows nothing of how good they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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


def candidates(config: EagleConfig, settings: EagleSettings, target: "PreTrainedModel") -> list[Convention]:
    """All plausible conventions, first the one that the config declares, then those that differ in little; of the taps
    in `settings` the number is right. Raises ValueError where no list of layers fits the target."""
    taps = _taps(config, settings, target)
    ropes = _ropes(config, settings.layer, target)
    declared = bool(config.flag("norm_before_residual")) and settings.wide
    residuals = [declared, not declared] if settings.wide else [False]
    made = [
        Convention(
            replace(
                settings, taps=tap, norm_before_residual=residual, layer={**settings.layer, "rope_parameters": rope}
            ),
            f"hidden states {_ids(tap, target)}",
            f"rope base {rope['rope_theta']:g}" + (f" ({rope['rope_type']})" if rope["rope_type"] != "default" else ""),
            f"norm_before_residual={str(residual).lower()}",
            sum((tap != taps[0], rope != ropes[0], residual != residuals[0])),
        )
        for tap in taps
        for rope in ropes
        for residual in residuals
    ]
    return sorted(made, key=lambda convention: convention.changes)


def _taps(config: EagleConfig, settings: EagleSettings, target: "PreTrainedModel") -> list[tuple[Tap, ...]]:
    count, layers = len(settings.taps), target.config.get_text_config().num_hidden_layers
    if not settings.fuse:  # no map from several states, so it reads the last one
        return [(HEAD,)]
    declared = [ids for ids in config.layer_ids() if len(ids) == count]
    default = default_ids(count, layers)
    shifted = [[number + shift for number in ids] for shift in (1, -1) for ids in declared or [default]]
    spread = [spread_ids(count, layers)] if count > 1 else []
    lists = [*declared, *(shifted if declared else [default, *shifted]), default, *spread]
    width = count * feature_sizes(target, (0,))[0]
    fitting = [
        taps for ids in lists
        if len(set(ids)) == count and all(1 <= number <= layers for number in ids)
        and sum(feature_sizes(target, taps := tuple(_tap(number, layers) for number in sorted(ids)))) == width
    ]  # fmt: skip
    if not fitting:
        said = f"names layers {declared[0]}" if declared else f"reads {count} layers"
        raise ValueError(
            f"drafter {config.name} {said}, and this target has {layers}; use a drafter made for this target"
        )
    return list(dict.fromkeys(fitting))


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
