"""What the config of a published EAGLE head says, in all spellings, as far as its tensors do not tell.

Layer ids are numbers of transformers' `hidden_states` here: k is what goes into decoder layer k, the output of layer
k - 1. Files count in that way, or give the number of the layer whose output it is. Counts and widths are not looked at.
Knows no tensor.
"""

from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..eagle.layers import FULL, SLIDING

IDS = "eagle_aux_hidden_state_layer_ids"
BASE = 10000.0  # of rotary frequencies where a config gives none; EAGLE-3's own heads were trained with it


class EagleConfig:
    """A config.json; `name` is the drafter's, for refusals."""

    def __init__(self, content: dict[str, Any], name: str):
        self.name = name
        self.content = content
        nested = content.get("transformer_layer_config")  # speculators' own
        self.layer: dict[str, Any] = nested if isinstance(nested, dict) else content
        eagle = content.get("eagle_config")
        self.eagle: dict[str, Any] = eagle if isinstance(eagle, dict) else {}

    def refused(self, field: str, value: object, rule: str) -> ValueError:
        return ValueError(f"drafter {self.name}: its config says {field}={value!r}, {rule}; fetch the drafter again")

    def number(self, field: str) -> int | None:
        """A number of things in the layers; None where it is not said, or wrong: tensors overrule it anyway."""
        value = self.layer.get(field)
        return value if type(value) is int and value > 0 else None

    def epsilon(self) -> float:
        """Of the norms."""
        value = self.layer.get("rms_norm_eps", 1e-6)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.refused("rms_norm_eps", value, "which is no small number")
        return float(value)

    def activation(self) -> str:
        value = self.layer.get("hidden_act", "silu")
        if not isinstance(value, str) or value not in ACT2FN:
            raise self.refused("hidden_act", value, "which transformers does not know")
        return value

    def flag(self, field: str) -> bool | None:
        """Whether something is so; None where it is not said. `eagle_config` overrules the rest, as in the engines."""
        value = self.eagle.get(field, self.content.get(field))
        if value is not None and not isinstance(value, bool):
            raise self.refused(field, value, "which is neither true nor false")
        return value

    def reads_last_state(self) -> bool:
        """Whether it says that EAGLE-3's layers read the target's last hidden state as it is, through no `fc`."""
        return self.eagle.get("use_aux_hidden_state", self.content.get("use_aux_hidden_state")) is False

    def rope(self) -> dict[str, Any]:
        """The rotary frequencies, as `rope_parameters`. The target's are not inherited."""
        spelt = [self.layer.get("rope_parameters"), self.layer.get("rope_scaling")]
        parts = [part.get("full_attention", part) for part in spelt if isinstance(part, dict)]
        if any(not isinstance(part, dict) for part in parts):
            raise self.refused("rope_parameters", spelt[0], "which is no object of numbers")
        bases = [part.get("rope_theta") for part in [*parts, self.layer]]
        base = next((value for value in bases if value is not None), BASE)
        if type(base) not in (int, float) or not 1 < base < float("inf"):
            raise self.refused("rope_theta", base, "which is no base of rotary frequencies")
        for share in (part.get("partial_rotary_factor") for part in [*parts, self.layer]):
            if share not in (None, 1):
                raise self.refused("partial_rotary_factor", share, "and layers of Llama and Qwen3 turn whole heads")
        for part in parts:
            kind = part.get("rope_type", part.get("type"))
            if kind in (None, "default", "mrope"):  # the last has the same frequencies for text
                continue
            if not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS:
                raise self.refused("rope_type", kind, "which transformers does not know")
            numbers = {name: value for name, value in part.items() if name != "type"}
            return {**numbers, "rope_type": kind, "rope_theta": float(base)}
        return {"rope_type": "default", "rope_theta": float(base)}

    def windows(self, layers: int) -> dict[str, Any]:
        """What attention of so many layers looks at, in transformers' fields; empty where all of them see all the text.
        Without `layer_types` a window is used where `use_sliding_window` says so, from layer `max_window_layers` on."""
        used, window = self.layer.get("use_sliding_window"), self.layer.get("sliding_window")
        first = self.number("max_window_layers") or 0
        slides = [used is True and number >= first for number in range(layers)]
        types = self.layer.get("layer_types") or [SLIDING if here else FULL for here in slides]
        known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types[:layers])
        if not known or len(types) < layers:
            raise self.refused("layer_types", types, f"which are not {FULL} or {SLIDING} for {layers} layers")
        if SLIDING not in types[:layers]:
            return {}
        if type(window) is not int or window < 1 or used is False:
            rule = f"and use_sliding_window={used!r}, and it has layers of {SLIDING}"
            raise self.refused("sliding_window", window, rule)
        return {"layer_types": types[:layers], "sliding_window": window, "use_sliding_window": True}

    def layer_ids(self) -> list[list[int]]:
        """The lists of ids that it declares, the most trusted first; without a doubt about how they count."""
        shifted = {"eagle_config": self.eagle.get(IDS), "target_layer_ids": self.content.get("target_layer_ids")}
        plain = {
            IDS: self.content.get(IDS),
            "aux_hidden_state_layer_ids": self.content.get("aux_hidden_state_layer_ids"),
        }
        for field, value in {**plain, **shifted}.items():
            if value is not None and not (isinstance(value, list) and all(type(number) is int for number in value)):
                raise self.refused(field, value, "which is no list of layers")
        declared = [value for value in plain.values() if value]
        return declared + [[number + 1 for number in value] for value in shifted.values() if value]

    def verifier(self) -> str | None:
        """The name of the target that it was trained for, where that is said."""
        spec = self.content.get("speculators_config")
        inner = spec.get("verifier") if isinstance(spec, dict) else None
        names = [inner.get("name_or_path") if isinstance(inner, dict) else None]
        names += [self.content.get("base_model_name_or_path"), self.content.get("target_model_name_or_path")]
        return next((name for name in names if isinstance(name, str) and name), None)


def default_ids(count: int, layers: int) -> list[int]:
    """The layers that are tapped where a config names none: early, middle and late for three, the last one's output
    after the norm for one, and evenly spread for others, as DeepSpec's."""
    if count == 1:
        return [layers]
    if count == 3:
        return [2, layers // 2, layers - 3]
    return spread_ids(count, layers)


def spread_ids(count: int, layers: int) -> list[int]:
    return [round(2 + number * (layers - 4) / (count - 1)) for number in range(count)]
