"""`paceline profile --compare`: what decoding gains here, prompt by prompt, against fair baselines.

Three ways decode every prompt in turns, the order rotating: transformers' own generate(), plain decoding with
the chosen executor, and the drafter with the same executor. Ratios are of times for equal tokens.
"""

import statistics
import sys
import time
from collections import defaultdict

import torch
from tqdm import tqdm

from .console import table
from .generate import generate
from .loop import Trace

WAYS = ("transformers", "plain", "drafted")


def compare(model, prompts: list[tuple[str, dict]], drafter, tree, executor: str, new_tokens: int) -> None:
    """Decode `prompts` (category, encoded) in all ways and print a table by category.

    The first prompts of every shape are decoded twice, the first time to warm up (and compile) unmeasured."""
    seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
    traces, differing = defaultdict(Trace), 0
    for _, prompt in prompts:  # whatever has to be compiled or allocated
        for way in WAYS[1:]:
            _decode(model, prompt, way, drafter, tree, executor, 2, new_tokens)
    for number, (category, prompt) in enumerate(tqdm(prompts, desc="comparing", unit="prompt", file=sys.stderr)):
        times, texts = {}, {}
        for way in [*WAYS[number % 3 :], *WAYS[: number % 3]]:
            started = time.perf_counter()
            texts[way], trace = _decode(model, prompt, way, drafter, tree, executor, new_tokens, new_tokens)
            elapsed = time.perf_counter() - started
            times[way] = elapsed / (texts[way].shape[1] - prompt["input_ids"].shape[1])
            if way == "drafted":
                traces[category].events += trace.events
        seconds[category].append(times)
        differing += not torch.equal(texts["plain"], texts["drafted"])
    rows = [_row(category, seconds[category], traces[category]) for category in seconds]
    together = Trace([event for trace in traces.values() for event in trace.events])
    rows.append(_row("together", [times for own in seconds.values() for times in own], together))
    header = ["category", "prompts", "transformers tok/s", "plain tok/s", "drafted tok/s", "plain / transformers"]
    print(table([*header, "drafted / plain", "tokens per step"], rows))
    print(f"ratios are medians over prompts; texts that differ from plain: {differing} of {len(prompts)}")


def _decode(model, prompt, way: str, drafter, tree, executor: str, tokens: int, room: int):
    """Decode up to `tokens` in a run that has room for `room`, so that all runs of a prompt share a shape."""
    if way == "transformers":
        return model.generate(**prompt, do_sample=False, max_new_tokens=tokens), None
    drafting = {"drafter": drafter, "tree": tree} if way == "drafted" else {}
    stop = {"stopping_criteria": [_After(prompt["input_ids"].shape[1] + tokens)]} if tokens < room else {}
    out = generate(
        model, **prompt, **drafting, **stop, executor=executor, do_sample=False, max_new_tokens=room,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, out.trace


class _After:
    """A stopping criterion: a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def _row(name: str, times: list[dict[str, float]], trace: Trace) -> list[str]:
    rates = [1 / statistics.median(own[way] for own in times) for way in WAYS]
    gain = statistics.median(own["transformers"] / own["plain"] for own in times)
    speedup = statistics.median(own["plain"] / own["drafted"] for own in times)
    per_step = trace.summary()["tokens_per_step"]
    return [
        name,
        str(len(times)),
        *(f"{rate:.1f}" for rate in rates),
        f"{gain:.2f}x",
        f"{speedup:.2f}x",
        f"{per_step:.2f}",
    ]
