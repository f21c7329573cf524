"""`patch`: a model whose own `generate` decodes with speculation, for callers that cannot be changed.

Pipelines, evaluation harnesses, trainers and chat front ends call `model.generate`. A patched model answers with
`paceline.generate`; a call that is refused there, or means more than the text, is answered by transformers as before,
and one warning per reason says so. Knows nothing of decoding: where an error comes from tells whether it began.
"""

import functools
import inspect
import re
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from . import loop
from .arguments import WITHOUT_EFFECT, check_writable, setting
from .engines.executors import executor_names
from .generate import SpeculativeOutput, generate
from .metrics import summary
from .plan.store import read_shape
from .proposal import Drafter, NoDrafter, is_drafter
from .target.selftest import attach
from .trace import Event
from .verify import RULES

SETTINGS = ("tree", "verify", "seed", "executor", "prefill_chunk", "trace_file")
_KEYS = ("generate", "__getstate__", "_paceline_patch")  # what a patch puts into the model's own dictionary
_CONFIG = set(GenerationConfig().to_dict())
_KNOWN = _CONFIG | {
    "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer", "tokenizer",
}  # fmt: skip
# The caller's own speculation or loop; transformers' speculation needs its assistant's cache back.
_OWN_WAYS = (
    "assistant_model", "custom_generate", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
    "speculation_type", "is_assistant",
)  # fmt: skip
# Of other ways of decoding, or of how transformers runs; they change no text here.
_IDLE = WITHOUT_EFFECT | {"assistant_ensemble_weight", "continuous_batching_config", "trust_remote_code"}
_PLAIN_CACHES = (None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window")  # keep what they are given
_SUMS = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens", "num_examined_draft_tokens", "num_tokens")


def patch(model: PreTrainedModel, drafter: Drafter | str | Path | None = "auto", **settings: Any) -> "Patch":
    """Let `model.generate` decode with speculation until `unpatch(model)` or the end of a `with` block.

    `drafter` is a drafter, or a name or folder, which is loaded now. `settings` are those of `paceline.generate`:
    `tree`, `verify`, `seed`, `executor`, `prefill_chunk`, `trace_file`; they hold for every call, so calls that sample
    from one prompt with one seed draw one text. What Paceline cannot do (beam search, a cache handed in, training mode)
    is done by transformers, with one warning per reason; a caller's own `assistant_model=`, `prompt_lookup_num_tokens=`
    or `custom_generate=` is respected in silence. Outputs are transformers' own, but without a cache.

    A second patch replaces the settings of the first; as a `with` block it brings the first back at its end. Copies and
    pickles of a patched model are not patched. Of a torch.compiled or PEFT model, the transformers model inside, which
    its `generate` calls, is. Raises ValueError, in one sentence, for what no call could use: settings, drafter, model.
    """
    model = _inner(model)
    return Patch(model, _checked(model, drafter, settings), settings)


def unpatch(model: PreTrainedModel) -> None:
    """Give `model` its own `generate` back, however often it was patched; nothing of a patch is left. A wrapper that
    somebody has put around it since stays, and reaches transformers' own."""
    if active := vars(_inner(model)).get("_paceline_patch"):
        active._restore({})


class Patch:
    """What `patch` has done to a model, and what has become of the calls since; leaving it as a context undoes it.

    `speculated` counts the calls that Paceline decoded, `fell_back` by reason those that went to transformers."""

    def __init__(self, model: PreTrainedModel, drafter: Drafter | None, settings: dict[str, Any]):
        self.model, self.drafter, self.settings = model, drafter, settings
        self.original = MethodType(type(model).generate, model)
        self.function = functools.update_wrapper(functools.partial(self._generate), self.original)
        self.entered, self.speculated = False, 0
        self.fell_back, self._figures, self._seconds = Counter[str](), Counter[str](), Counter[str]()
        self._install()

    def __enter__(self) -> "Patch":
        if vars(self.model).get("_paceline_patch") is not self:
            self._install()
        self.entered = True
        return self

    def __exit__(self, *raised: object) -> None:
        self.entered = False
        self._restore(self.before)

    def summary(self) -> dict:
        """The sums and rates of `Trace.summary()` over all calls that were decoded to the end."""
        total = {name: self._figures[name] for name in _SUMS}
        steps, accepted, drafted, _, tokens = total.values()
        rates = {
            "mean_acceptance_length": 1 + accepted / steps if steps else None,
            "draft_acceptance_rate": accepted / drafted if drafted else None,
            "tokens_per_step": tokens / steps if steps else None,
        }
        return {**total, **rates, "seconds": dict(self._seconds)}

    def _install(self) -> None:
        own = vars(self.model)
        outer, self.before = own.get("_paceline_patch"), {key: own[key] for key in _KEYS if key in own}
        if outer and not outer.entered:
            outer.before = {}  # nothing comes back to what was before it
        own.update(generate=self.function, __getstate__=self._state, _paceline_patch=self)

    def _restore(self, before: dict) -> None:
        own = vars(self.model)
        active = own.get("_paceline_patch")
        found = {key: own.pop(key, None) for key in _KEYS} if active else {}
        own.update(before)
        if active and found["generate"] is not active.function:  # somebody's wrapper
            own["generate"] = found["generate"]

    def _state(self) -> dict:
        """The model's attributes as copies and pickles take them."""
        state = MethodType(type(self.model).__getstate__, self.model)()
        return {key: value for key, value in state.items() if key not in _KEYS}

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if vars(self.model).get("_paceline_patch") is not self:
            return self.original(*args, **kwargs)
        signature = inspect.signature(self.original)
        signature.bind(*args, **kwargs)  # TypeError, as in the call itself
        given = {**dict(zip(signature.parameters, args)), **kwargs}
        if way := next((name for name in _OWN_WAYS if setting(self.model, given, name)), None):
            self.fell_back[f"{way}= is the caller's own way of decoding"] += 1
            return self.original(*args, **kwargs)
        if (streamer := given.get("streamer")) is not None:
            given["streamer"] = streamer = _Streamer(streamer)
        try:
            return self._speculate(given)
        except ValueError as error:
            if not _refused(error):
                raise
            reason = str(error).partition("; use model.generate")[0]  # which it does
        self._tell(reason)
        if streamer is None or not streamer.puts:
            return self.original(*args, **kwargs)
        streamer.skip = streamer.puts
        return self.original(**given)

    def _speculate(self, given: dict[str, Any]) -> Tensor | GenerateDecoderOnlyOutput:
        events: list[Event] = []
        kwargs = {**_asked(self.model, given), **self.settings, "drafter": self.drafter}
        out = generate(self.model, on_step=events.extend, **kwargs)
        figures = summary([event for event in events if event.committed])  # a stop may have cut some later
        self.speculated += 1
        self._figures.update({name: figures[name] for name in _SUMS})
        self._seconds.update(figures["seconds"])
        if not isinstance(out, SpeculativeOutput):
            return out
        return GenerateDecoderOnlyOutput(sequences=out.sequences, scores=out.scores, logits=out.logits)

    def _tell(self, reason: str) -> None:
        """Count a fall back, and warn the caller of `model.generate` of one that is new but for its numbers."""
        plain = functools.partial(re.sub, r"\d+", "0")
        told = next((old for old in self.fell_back if plain(old) == plain(reason)), None)
        if told is None:
            warnings.warn(f"transformers' own generate decodes, without speculation: {reason}", stacklevel=3)
        self.fell_back[told or reason] += 1


class _Streamer:
    """A streamer that is given nothing twice: of a second loop it skips as many puts as the first made."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.puts, self.skip = streamer, 0, 0

    def put(self, value: Tensor) -> None:
        self.skip -= 1
        if self.skip < 0:
            self.puts += 1
            self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _inner(model: Any) -> PreTrainedModel:
    """The transformers model within torch.compile's and PEFT's wrappers."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, GenerationMixin) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} is no transformers model with a generate; pass the model inside it")
    return model


def _checked(model: PreTrainedModel, drafter: Any, settings: dict[str, Any]) -> Drafter | None:
    """The drafter as an object, all settings being such that a call can use them."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise ValueError(f"patch() does not take {unknown[0]!r}; its settings are {', '.join(SETTINGS)}")
    for name, names in (("verify", RULES), ("executor", executor_names())):
        if name in settings and settings[name] not in names:
            raise ValueError(f"{name}={settings[name]!r} is none of {', '.join(names)}")
    if file := settings.get("trace_file"):
        check_writable(file)
    active, own = (vars(model).get(key) for key in ("_paceline_patch", "generate"))
    if own is not None and own is not getattr(active, "function", None):
        raise ValueError("model.generate is somebody's own, which speculation would pass by; patch the model before it")
    if not model.training:  # else the first call that is not will
        attach(model)
    if isinstance(drafter, (str, Path)):
        from .. import load_drafter

        drafter = load_drafter(drafter, model)
    if drafter is not None and not is_drafter(drafter):
        raise ValueError(f"drafter is a {type(drafter).__name__}; pass a name, a folder or what load_drafter returns")
    if (tree := settings.get("tree")) not in (None, "auto"):
        read_shape(tree, drafter or NoDrafter())
    return drafter


def _asked(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """A call of `model.generate` as `paceline.generate` takes it. Raises ValueError where it would mean less there."""
    asked = {name: value for name, value in given.items() if name not in _IDLE}
    asked = {name: value for name, value in asked.items() if value is not None or name in _CONFIG}
    if "input_ids" not in asked and "inputs" in asked:
        asked["input_ids"] = asked.pop("inputs")
    synced = asked.pop("synced_gpus", None)
    if GenerationMixin._extract_generation_mode_kwargs(model, None, {}, synced, None, None)["synced_gpus"]:
        raise ValueError("synced_gpus keeps processes in step, one forward per token; Paceline's rows take fewer")
    cache = setting(model, asked, "cache_implementation")
    if cache not in _PLAIN_CACHES:
        raise ValueError(f"cache_implementation={cache!r} keeps the past elsewhere or rounded; Paceline has its own")
    asked.pop("cache_implementation", None)
    if more := [name for name in asked if name not in _KNOWN]:
        raise ValueError(f"{', '.join(more)} would go to the model itself, which Paceline gives token ids only")
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if prepare is not type(model).prepare_inputs_for_generation:
        raise ValueError("prepare_inputs_for_generation of this model was replaced (by prompt tuning?)")
    return asked


def _refused(error: ValueError) -> bool:
    """Whether Paceline has refused before decoding; else decoding failed, or transformers itself refuses the call."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [frame.f_code for frame in frames]
    prepares = inspect.unwrap(GenerationMixin.generate).__code__
    if loop.decode.__code__ in codes or prepares not in codes:
        return loop.decode.__code__ not in codes
    inside = frames[codes.index(prepares) + 1 :]
    return any(frame.f_globals.get("__name__") == generate.__module__ for frame in inside)
