"""`patch`: a model whose own `generate` decodes with speculation, for callers that cannot be changed.

Pipelines, evaluation harnesses, trainers and chat front ends call `model.generate`. On a patched model that runs
`paceline.generate`. A call that Paceline does not support falls back to transformers, with one warning per reason. From
the traceback of an error it is told whether Paceline refused the call or decoding had begun.
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
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from . import loop
from .arguments import CONFIG, IDLE, WITHOUT_EFFECT, inputs_of, setting
from .engines.executors import executor_names
from .files import check_writable
from .generate import SpeculativeOutput, generate
from .metrics import summary
from .plan.store import read_shape
from .proposal import Drafter, NoDrafter
from .target.adapters import refuse_unfit
from .target.given import cache_name
from .target.selftest import attach
from .trace import Event
from .verify import RULES

SETTINGS = ("tree", "verify", "seed", "executor", "prefill_chunk", "trace_file", "reuse")
_KEYS = ("generate", "__getstate__", "_paceline_patch")  # the attributes that a patch sets on the model
_KNOWN = CONFIG | {
    "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer", "tokenizer",
}  # fmt: skip
# The caller asks for another speculation or loop, or is transformers' speculation, which needs the cache returned.
_OWN_WAYS = (
    "assistant_model", "custom_generate", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
    "speculation_type", "is_assistant",
)  # fmt: skip
# Arguments that belong to other ways of decoding, or to how transformers runs; they do not change the text here.
_IDLE = WITHOUT_EFFECT | IDLE
_PLAIN_CACHES = (None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window")  # store states unchanged
_SUMS = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens", "num_examined_draft_tokens", "num_tokens")


def patch(
    model: PreTrainedModel, drafter: Drafter | PreTrainedModel | str | Path | None = "auto", **settings: Any
) -> "Patch":
    """Let `model.generate` decode with speculation until `unpatch(model)` or the end of a `with` block.

    `drafter` is a drafter, a smaller causal LM, or a name or folder, which is loaded now. `settings` are those of
    `paceline.generate`: `tree`, `verify`, `seed`, `executor`, `prefill_chunk`, `trace_file`, `reuse`; they hold always,
    so calls that sample from one prompt with one seed draw one text. What Paceline cannot do (beam search, a rounded
    cache, training mode) is done by transformers, with one warning per reason; a caller's own `assistant_model=`,
    `prompt_lookup_num_tokens=` or `custom_generate=` is respected in silence. Outputs are transformers' own, with
    a cache only where one was handed in.

    A second patch replaces the settings of the first; as a `with` block it brings the first back at its end. Copies and
    pickles of a patched model are not patched. Of a torch.compiled or PEFT model, the transformers model inside, which
    its `generate` calls, is. Raises ValueError, in one sentence, for what no call could use: settings, drafter, model.
    """
    model = _inner(model)
    return Patch(model, _checked(model, drafter, settings), settings)


def unpatch(model: PreTrainedModel) -> None:
    """Restore `model.generate`, however often it was patched. A wrapper that other code has put around the patched
    `generate` since then stays, and calls transformers' own."""
    if active := vars(_inner(model)).get("_paceline_patch"):
        active._restore({})


class Patch:
    """An active patch and statistics of the calls since; as a context manager it is undone at the end of the block.

    `speculated` counts the calls that Paceline decoded, `fell_back` those that went to transformers, by reason."""

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
        """Sums and rates as in `Trace.summary()`, over all calls that Paceline completed."""
        total = {name: self._figures[name] for name in _SUMS}
        steps, accepted, drafted, _, tokens = total.values()
        rates = {
            "mean_acceptance_length": 1 + accepted / steps if steps else None,
            "draft_acceptance_rate": accepted / drafted if drafted else None,
            "tokens_per_step": tokens / steps if steps else None,
        }
        return {**total, **rates, "seconds": dict(self._seconds)}

    def _install(self) -> None:
        attributes = vars(self.model)
        outer = attributes.get("_paceline_patch")
        self.before = {key: attributes[key] for key in _KEYS if key in attributes}
        if outer and not outer.entered:
            outer.before = {}  # nothing comes back to what was before it
        attributes.update(generate=self.function, __getstate__=self._state, _paceline_patch=self)

    def _restore(self, before: dict) -> None:
        attributes = vars(self.model)
        active = attributes.get("_paceline_patch")
        removed = {key: attributes.pop(key, None) for key in _KEYS} if active else {}
        attributes.update(before)
        if active and removed["generate"] is not active.function:  # somebody's wrapper
            attributes["generate"] = removed["generate"]

    def _state(self) -> dict:
        """The model's state for copying and pickling, without the patch."""
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
        fields = "sequences", "scores", "logits", cache_name()
        return GenerateDecoderOnlyOutput(**{name: getattr(out, name) for name in fields})

    def _tell(self, reason: str) -> None:
        """Count a fallback, and warn once per reason; reasons that differ only in numbers are the same."""
        plain = functools.partial(re.sub, r"\d+", "0")
        told = next((old for old in self.fell_back if plain(old) == plain(reason)), None)
        if told is None:
            warnings.warn(f"transformers' own generate decodes, without speculation: {reason}", stacklevel=3)
        self.fell_back[told or reason] += 1


class _Streamer:
    """Wraps a streamer: when transformers decodes again after a failure, the first `skip` puts are not repeated."""

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
    """The transformers model inside torch.compile's and PEFT's wrappers."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, GenerationMixin) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} is no transformers model with a generate; pass the model inside it")
    return model


def _checked(model: PreTrainedModel, drafter: Any, settings: dict[str, Any]) -> Drafter | None:
    """The drafter object, after checking all settings. Raises ValueError for what no call could use."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise ValueError(f"patch() does not take {unknown[0]!r}; its settings are {', '.join(SETTINGS)}")
    for name, names in (("verify", RULES), ("executor", executor_names())):
        if name in settings and settings[name] not in names:
            raise ValueError(f"{name}={settings[name]!r} is none of {', '.join(names)}")
    if file := settings.get("trace_file"):
        check_writable(file, appended=True)
    active, current = (vars(model).get(key) for key in ("_paceline_patch", "generate"))
    if current is not None and current is not getattr(active, "function", None):
        raise ValueError("model.generate is somebody's own, which speculation would pass by; patch the model before it")
    if not model.training:  # else the first call that is not will
        attach(model)
    if drafter is not None:
        from .. import load_drafter

        drafter = load_drafter(drafter, model)
    if (tree := settings.get("tree")) not in (None, "auto"):
        read_shape(tree, drafter or NoDrafter())
    return drafter


def _asked(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `model.generate` for `paceline.generate`. Raises ValueError where that would lose something."""
    asked = {name: value for name, value in given.items() if name not in _IDLE}
    asked = {name: value for name, value in asked.items() if value is not None or name in CONFIG}
    if "input_ids" not in asked and "inputs" in asked:
        asked["input_ids"] = asked.pop("inputs")
    synced = asked.pop("synced_gpus", None)
    if GenerationMixin._extract_generation_mode_kwargs(model, None, {}, synced, None, None)["synced_gpus"]:
        raise ValueError("synced_gpus keeps processes in step, one forward per token; Paceline's rows take fewer")
    cache = setting(model, asked, "cache_implementation")
    if cache not in _PLAIN_CACHES:
        raise ValueError(f"cache_implementation={cache!r} keeps the past elsewhere or rounded; Paceline has its own")
    asked.pop("cache_implementation", None)
    if more := [name for name in asked if name not in _KNOWN | inputs_of(model)]:
        raise ValueError(f"{', '.join(more)} is nothing that Paceline or the model's forward takes")
    refuse_unfit(model)
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if prepare is not type(model).prepare_inputs_for_generation:
        raise ValueError("prepare_inputs_for_generation of this model was replaced (by prompt tuning?)")
    return asked


def _refused(error: ValueError) -> bool:
    """Whether `error` is Paceline's refusal before decoding, not a failure in decoding or transformers' own refusal."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    codes = [frame.f_code for frame in frames]
    prepares = inspect.unwrap(GenerationMixin.generate).__code__
    if loop.decode.__code__ in codes or prepares not in codes:
        return loop.decode.__code__ not in codes
    inside = frames[codes.index(prepares) + 1 :]
    return any(frame.f_globals.get("__name__") == generate.__module__ for frame in inside)
