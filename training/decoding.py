"""Decoding prompts and counting: measured tokens per step, with the numbers of steps, tokens and prompts behind it."""

import contextlib
from dataclasses import dataclass

from transformers import GenerationConfig

from ..spec.console import Bar
from ..spec.generate import generate
from ..spec.prompts import left_padded
from ..spec.trace import Event

BATCH = 8  # prompts decoded together

Prompts = list[tuple[str, dict]]  # category, encoded as a batch of one row


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int
    temperature: float = 0.0
    verify: str = "match"
    executor: str = "eager"

    @property
    def sampling(self) -> dict:
        """The sampling options of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0}


def decode(model, prompts: Prompts, drafter, shape, settings: Settings) -> list[list[Event]]:
    """Decode all prompts in batches of similar length; the events of each. A prompt's seed is its number."""
    order = sorted(range(len(prompts)), key=lambda number: prompts[number][1]["input_ids"].shape[1])
    events_of_prompts: list[list[Event]] = [[] for _ in prompts]
    settings_of_call = dict(verify=settings.verify, executor=settings.executor, max_new_tokens=settings.max_new_tokens)
    with Bar(range(0, len(order), BATCH), desc="decoding", unit="batch", leave=False) as bar:
        for start in bar:
            numbers = order[start : start + BATCH]
            ids = [prompts[number][1]["input_ids"][0].tolist() for number in numbers]
            batch = left_padded(ids, 0, model.device)
            options = {**settings_of_call, **settings.sampling, "seed": numbers, "return_dict_in_generate": True}
            with _own_law(model):
                out = generate(model, **batch, drafter=drafter, tree=shape, **options)
            for row, events in out.trace.rows():
                events_of_prompts[numbers[row]] = events
    return events_of_prompts


@contextlib.contextmanager
def _own_law(model):
    """Within, the model's generation config holds its special tokens only: the estimates from p do not account for
    the penalties and cut-offs (top-k, top-p) that some models define there."""
    kept = model.generation_config
    ids = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = kept


def counted(decoded: list[list[Event]]) -> dict:
    """Tokens per step over some prompts, with the numbers of steps, tokens and prompts."""
    steps = sum(map(len, decoded))
    tokens = sum(len(event.committed) for events in decoded for event in events)
    return {"tokens_per_step": tokens / max(steps, 1), "steps": steps, "tokens": tokens, "prompts": len(decoded)}


def by_category(prompts: Prompts, decoded: list[list[Event]]) -> dict[str, dict]:
    """`counted` for the prompts of each category."""
    groups: dict[str, list[list[Event]]] = {}
    for (category, _), events in zip(prompts, decoded):
        groups.setdefault(category, []).append(events)
    return {category: counted(decoded_of_category) for category, decoded_of_category in groups.items()}
