"""`paceline profile --compare`: what decoding gains here, prompt by prompt, against fair baselines.

Three ways decode every prompt in turns, the order rotating: transformers' own generate(), plain decoding with
the chosen executor, and the drafter with the same executor. Ratios are of times for equal tokens, of whole calls and
of decoding alone, which begins when the first tokens are there.
"""

import statistics
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .console import table
from .generate import SpeculativeOutput, generate
from .proposal import Drafter
from .trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = ("transformers", "plain", "drafted")


def compare(
    model: "PreTrainedModel",
    prompts: list[tuple[str, dict]],
    drafter: Drafter,
    tree: str | None,
    executor: str,
    new_tokens: int,
) -> None:
    """Decode `prompts` (category, encoded) in all ways and print a table by category.

    The first prompts of every shape are decoded twice, the first time to warm up (and compile) unmeasured."""
    seconds: dict[str, list[dict[str, tuple[float, float]]]] = defaultdict(list)
    traces: dict[str, Trace] = defaultdict(Trace)
    differing = 0
    for _, prompt in prompts:  # whatever has to be compiled or allocated
        for way in WAYS[1:]:
            _decode(model, prompt, way, drafter, tree, executor, 2, new_tokens)
    for number, (category, prompt) in enumerate(tqdm(prompts, desc="comparing", unit="prompt", file=sys.stderr)):
        times, texts = {}, {}
        for way in [*WAYS[number % 3 :], *WAYS[: number % 3]]:
            texts[way], times[way], trace = _decode(model, prompt, way, drafter, tree, executor, new_tokens, new_tokens)
            if trace is not None and way == "drafted":
                traces[category].events += trace.events
        seconds[category].append(times)
        differing += not torch.equal(texts["plain"], texts["drafted"])
    together = Trace([event for trace in traces.values() for event in trace.events])
    groups = [*((category, seconds[category], traces[category]) for category in seconds)]
    groups.append(("together", [times for own in seconds.values() for times in own], together))
    header = ["category", "prompts", "transformers tok/s", "plain tok/s", "drafted tok/s", "plain / transformers"]
    for part, what in enumerate(("whole calls", "decoding alone")):
        rows = [_row(name, [{way: own[way][part] for way in WAYS} for own in times], t) for name, times, t in groups]
        print(f"{what}\n{table([*header, 'drafted / plain', 'tokens per step'], rows)}\n")
    print(f"ratios are medians over prompts; texts that differ from plain: {differing} of {len(prompts)}")


class _Clock:
    """A streamer and step callback that notes how many tokens there were first, and when."""

    def __init__(self):
        self.prompt, self.first, self.tokens = True, 0.0, 0

    def put(self, tokens: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            self.note(len(tokens))

    def end(self) -> None:
        pass

    def note(self, tokens: int) -> None:
        if not self.tokens:
            self.first, self.tokens = time.perf_counter(), tokens


def _decode(
    model: "PreTrainedModel",
    prompt: dict,
    way: str,
    drafter: Drafter,
    tree: str | None,
    executor: str,
    tokens: int,
    room: int,
) -> tuple[torch.Tensor, tuple[float, float], Trace | None]:
    """Decode up to `tokens` in a run that has room for `room`, so that all runs of a prompt share a shape.

    Returns the text, seconds per token of the whole call and after the first tokens, and the trace."""
    clock, started = _Clock(), time.perf_counter()
    if way == "transformers":
        text, trace = model.generate(**prompt, do_sample=False, max_new_tokens=tokens, streamer=clock), None
    else:
        drafting: dict = {"drafter": drafter, "tree": tree} if way == "drafted" else {}
        stop: dict = {"stopping_criteria": [After(prompt["input_ids"].shape[1] + tokens)]} if tokens < room else {}
        out = generate(
            model, **prompt, **drafting, **stop, executor=executor, do_sample=False, max_new_tokens=room,
            return_dict_in_generate=True, on_step=lambda events: clock.note(len(events[0].committed)),
        )  # fmt: skip
        assert isinstance(out, SpeculativeOutput)
        text, trace = out.sequences, out.trace
    ended, count = time.perf_counter(), text.shape[1] - prompt["input_ids"].shape[1]
    return text, ((ended - started) / count, (ended - clock.first) / max(count - clock.tokens, 1)), trace


class After:
    """A stopping criterion: a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
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
