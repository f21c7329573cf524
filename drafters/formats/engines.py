"""The engines that drafters are exported for: how each is started, how many tokens it should draft, what is lost there.

The advice is the planner's, for a chain, as engines draft no planned trees. Engines are not run here, so their times
follow a simple model that is stated with the advice. Knows no kind of drafter, and no files.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...spec.plan.trees import Rates, choose_tree

CHECKED = 0.025  # of a plain step, for each further token that is checked: 8B weights on an H200, in docs/gpu.md
USUAL = 3  # draft tokens that most published heads are served with
LONGEST = 16  # draft tokens that are advised
_LAW = (
    "Sampled text follows the target's law there, but is not that of plain decoding with the same seed, which Paceline "
    "gives; greedy text can part from it where two tokens are nearly as probable."
)


@dataclass(frozen=True)
class Engine:
    """`name` is that of `--to`; `methods` are its names for the kinds of drafts; `command` makes what starts it of a
    method, the target's name, the folder and the number of draft tokens; `lost` is what Paceline has there."""

    name: str
    title: str
    methods: dict[str, str]
    command: Callable[[str, str, str, int], str]
    lost: str


def _vllm(method: str, target: str, folder: str, tokens: int) -> str:
    config = json.dumps({"method": method, "model": folder, "num_speculative_tokens": tokens})
    return f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(config)}"


def _speculators(method: str, target: str, folder: str, tokens: int) -> str:
    """vLLM finds the target by its hub id in the folder, and the number of tokens."""
    return _vllm(method, target, folder, tokens) if Path(target).is_dir() else f"vllm serve {shlex.quote(folder)}"


def _sglang(method: str, target: str, folder: str, tokens: int) -> str:
    return (
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm {method} "
        f"--speculative-draft-model-path {shlex.quote(folder)} --speculative-num-steps {tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
    )


def _transformers(method: str, target: str, folder: str, tokens: int) -> str:
    assistant = f"AutoModelForCausalLM.from_pretrained({folder!r})"
    return f"model.generate(**inputs, {method}={assistant}, num_assistant_tokens={tokens})"


def _tgi(method: str, target: str, folder: str, tokens: int) -> str:
    return f"text-generation-launcher --model-id {shlex.quote(folder)} --speculate {tokens}"


_ALL = (
    Engine(
        "vllm", "vLLM", {"eagle3": "eagle3", "eagle": "eagle", "draft_lm": "draft_model"}, _vllm,
        f"vLLM drafts chains, no trees. {_LAW}",
    ),
    Engine(
        "sglang", "SGLang", {"eagle3": "EAGLE3", "eagle": "EAGLE", "draft_lm": "STANDALONE"}, _sglang,
        f"SGLang's trees (--speculative-eagle-topk above 1) are not planned from measurements. {_LAW}",
    ),
    Engine("speculators", "vLLM", {"eagle3": "eagle3"}, _speculators, f"vLLM drafts chains, no trees. {_LAW}"),
    Engine(
        "transformers", "transformers", {"draft_lm": "assistant_model"}, _transformers,
        f"transformers drafts chains, for one text at a time. {_LAW}",
    ),
    Engine("tgi", "TGI", {"medusa": "medusa"}, _tgi, f"TGI drafts chains, no trees. {_LAW}"),
)  # fmt: skip
ENGINES = {engine.name: engine for engine in _ALL}


def engine_named(name: str) -> Engine:
    """Raises ValueError for a name that is none."""
    if name not in ENGINES:
        raise ValueError(f"{name!r} is no engine to export for; choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


@dataclass(frozen=True)
class Advice:
    """`tokens` to draft in a step, and the sentence that says why."""

    tokens: int
    why: str


def advise(rates: Rates | None, share: float, deepest: int | None = None) -> Advice:
    """How many tokens an engine should draft in a chain.

    `rates` is the acceptance p[depth][rank], None where it has not been measured. `share` is what a draft token costs:
    the weights that are read for it, as a share of the target's. `deepest` is the longest chain, where there is one."""
    most = min(LONGEST, deepest or LONGEST)
    if not rates:
        tokens = min(USUAL, most)
        return Advice(
            tokens,
            f"{counted(tokens)}: a usual number, as the acceptance of this drafter has not been measured; paceline "
            "evaluate does that.",
        )
    chain = [row[:1] for row in rates[:most] if row]
    levels = range(len(chain) + 1)
    checking = {level + 1: 1.0 + CHECKED * level for level in levels}
    plan = choose_tree(chain, checking, {level: share * level for level in levels})
    model = (
        f"a draft token costs {share:.1%} of a plain step (its weights by the target's) and each token that is checked "
        f"{CHECKED:.1%}"
    )
    tokens = len(plan.shape) - 1
    if tokens == 0:
        return Advice(1, f"1 draft token, the least that can be set: by the measured acceptance none pays if {model}.")
    limit = " (all depths that were measured)" * (tokens == len(chain) < most)
    return Advice(
        tokens,
        f"{counted(tokens)}{limit}: the planner's choice by the measured acceptance, {plan.tokens_per_step:.2f} tokens "
        f"per step and {plan.speedup:.2f} times plain decoding for one text at a time, if {model}. Measure it there.",
    )


def counted(tokens: int) -> str:
    return f"{tokens} draft token{'s' * (tokens != 1)}"
