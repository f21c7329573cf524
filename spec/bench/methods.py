"""What a bench compares: methods, how they are written, and how each decodes a batch.

    ar                          plain decoding by this project's loop
    ngram, FOLDER, hub id       speculation with that drafter
    transformers                model.generate()
    transformers-lookup         its prompt lookup
    transformers-assisted       its assisted generation, with drafter=FOLDER

A method is `NAME:key=value,...`, such as `ngram:tree=4x2x1,executor=compiled`; `weights=` are the drafter's.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..engines.executors import EXECUTORS, choose
from ..engines.runs import settled_capacity
from ..generate import SpeculativeOutput, generate
from ..plan.step_times import wait_for
from ..proposal import Drafter, NoDrafter
from ..trace import Trace
from ..tree import DynamicShape, TreeShape
from ..verify import RULES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEYS = ("tree", "rule", "executor", "temperature", "drafter", "weights", "name")
THEIRS = ("transformers", "transformers-lookup", "transformers-assisted")
LOOKUP_TOKENS = 10  # as in transformers' documentation


@dataclass(frozen=True, slots=True)
class Method:
    """One way to decode. `baseline` is the plain decoding that it is held against, None for plain decoding."""

    name: str
    kind: str  # "ar", "drafted" or one of THEIRS
    drafter: str | None
    tree: str | None
    rule: str
    executor: str | None  # None: transformers' own loop
    temperature: float
    baseline: str | None = None
    draft_weights: str = "16"

    def settled(self, model: "PreTrainedModel") -> "Method":
        """With the executor that "cuda_graph" means where `model` is."""
        if self.executor != "cuda_graph":
            return self
        return replace(self, executor=choose(self.executor, model, 0, capturable=True, compiled_before=False))

    def same_text(self) -> bool:
        """Whether its text must be its baseline's."""
        ours = self.kind == "drafted" and RULES[self.rule].same_text
        return self.temperature == 0 or ours


def parse_methods(texts: list[str], executor: str, temperature: float) -> list[Method]:
    """Methods as written, with `executor` and `temperature` where they name none, and the baselines they need:
    plain decoding with the same executor and temperature, and transformers' generate(). Raises ValueError."""
    methods = [_parse(text, executor, temperature) for text in texts]
    for method in list(methods):
        if method.kind == "drafted" and _baseline(method, methods) is None:
            methods.insert(0, _parse(_plain(method, executor, temperature), executor, temperature))
    for heat in sorted({method.temperature for method in methods}):
        if not any(method.kind == "ar" and method.temperature == heat for method in methods):
            methods.insert(0, _parse(f"ar:temperature={heat:g}" if heat != temperature else "ar", executor, heat))
        if not any(method.kind == "transformers" and method.temperature == heat for method in methods):
            text = "transformers" + (f":temperature={heat:g}" if heat != temperature else "")
            methods.append(_parse(text, executor, heat))
    names = [method.name for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"method {twice!r} is named twice; give one of them another name with name=")
    return [
        method if method.kind == "ar" else replace(method, baseline=_baseline(method, methods)) for method in methods
    ]


def _plain(method: Method, executor: str, temperature: float) -> str:
    options = [f"executor={method.executor}"] * (method.executor != executor)
    options += [f"temperature={method.temperature:g}"] * (method.temperature != temperature)
    return "ar:" + ",".join(options) if options else "ar"


def _baseline(method: Method, methods: list[Method]) -> str | None:
    plain = [other for other in methods if other.kind == "ar" and other.temperature == method.temperature]
    if method.executor is not None:
        plain = [other for other in plain if other.executor == method.executor]
    return plain[0].name if plain else None


def _parse(text: str, executor: str, temperature: float) -> Method:
    head, _, rest = text.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in KEYS or not equals or not value:
            raise ValueError(f"method {text!r}: {item!r} is not one of {', '.join(key + '=...' for key in KEYS)}")
        options[key] = value
    try:
        heat = float(options.get("temperature", temperature))
    except ValueError:
        heat = -1.0
    if not 0 <= heat < float("inf"):
        raise ValueError(f"method {text!r}: the temperature is not a number of at least 0; 0 is greedy")
    by_transformers = head in THEIRS
    kind = head if by_transformers or head == "ar" else "drafted"
    unfit = {"drafter"}
    if kind != "drafted":
        unfit = {"tree", "rule", "weights", "executor" if by_transformers else "drafter"}
    if head == "transformers-assisted":
        if "drafter" not in options:
            raise ValueError(f"method {text!r} needs drafter=, the folder or hub id of a draft model")
    elif by_transformers:
        unfit |= {"drafter"}
    for key in unfit & set(options):
        raise ValueError(f"method {text!r}: {head!r} takes no {key}=; leave it out")
    rule, runs = options.get("rule", "match"), options.get("executor", executor)
    executors = "cuda_graph", *EXECUTORS
    if rule not in RULES or (not by_transformers and runs not in executors):
        raise ValueError(f"method {text!r}: rules are {', '.join(RULES)}, executors {', '.join(executors)}")
    drafter = head if kind == "drafted" else options.get("drafter")
    name = options.get("name", text.rstrip(":"))
    executor_name, weights = None if by_transformers else runs, options.get("weights", "16")
    return Method(name, kind, drafter, options.get("tree"), rule, executor_name, heat, draft_weights=weights)


@dataclass(slots=True)
class Decoder:
    """A method with its drafter and tree loaded, ready to decode on `model`."""

    method: Method
    model: "PreTrainedModel"
    drafter: Drafter | None
    shape: TreeShape | DynamicShape | None
    pad: int

    def capacity(self, prompt: int, new_tokens: int) -> int:
        """The slots of a run: what its compiled step is bound to."""
        nodes = 1 if self.shape is None else self.shape.slots
        return settled_capacity(prompt + new_tokens + nodes + 1, self.method.executor or "eager")

    def decode(self, batch: dict, seeds: list[int], new_tokens: int) -> tuple[torch.Tensor, Trace | None, float]:
        """Texts (B, P + new), the trace where there is one, and seconds."""
        method, heat = self.method, self.method.temperature
        options: dict = {"max_new_tokens": new_tokens, "pad_token_id": self.pad, "do_sample": heat > 0}
        if heat > 0:
            options |= {"temperature": heat, "top_k": 0, "top_p": 1.0}
        wait_for(self.model)
        started = time.perf_counter()
        if method.executor is None:
            torch.manual_seed(seeds[0])
            texts, trace = self.model.generate(**batch, **options, **self._their_options()), None
        else:
            drafting: dict = {"drafter": self.drafter or NoDrafter(), "tree": self.shape, "verify": method.rule}
            options |= {"executor": method.executor, "seed": seeds, "return_dict_in_generate": True}
            out = generate(self.model, **batch, **drafting, **options)
            assert isinstance(out, SpeculativeOutput)
            texts, trace = out.sequences, out.trace
        wait_for(self.model)
        return texts, trace, time.perf_counter() - started

    def _their_options(self) -> dict:
        if self.method.kind == "transformers-lookup":
            return {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        return {} if self.drafter is None else {"assistant_model": self.drafter.traits.causal_lm}

    def about(self) -> dict:
        """The method as the header of a run file has it."""
        shape = None
        if self.shape is not None:
            parents = getattr(self.shape, "parents", None)
            shape = {"nodes": len(self.shape), "depth": self.shape.max_depth, "parents": parents and list(parents)}
        return {**asdict(self.method), "shape": shape}
