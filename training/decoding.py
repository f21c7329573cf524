"""Real decoding of prompts, counted: tokens per step with its denominators. Knows nothing of where p comes from."""

import contextlib
from dataclasses import dataclass

from tqdm import tqdm
from transformers import GenerationConfig

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
        """How `generate` is to draw."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0}


def decode(model, prompts: Prompts, drafter, shape, settings: Settings) -> list[list[Event]]:
    """Decode all prompts, each with a seed of its own; the events of each. Prompts of like length go together."""
    order = sorted(range(len(prompts)), key=lambda place: prompts[place][1]["input_ids"].shape[1])
    found: list[list[Event]] = [[] for _ in prompts]
    how = dict(verify=settings.verify, executor=settings.executor, max_new_tokens=settings.max_new_tokens)
    for start in tqdm(range(0, len(order), BATCH), desc="decoding", unit="batch", leave=False, disable=None):
        places = order[start : start + BATCH]
        ids = [prompts[place][1]["input_ids"][0].tolist() for place in places]
        batch = left_padded(ids, 0, model.device)
        options = {**how, **settings.sampling, "seed": places, "return_dict_in_generate": True}
        with _own_law(model):
            out = generate(model, **batch, drafter=drafter, tree=shape, **options)
        for row, events in out.trace.rows():
            found[places[row]] = events
    return found


@contextlib.contextmanager
def _own_law(model):
    """Decode by the model's own law: of its generation config only the special tokens count, and not the penalties
    and cuts that some models come with, which no forecast knows."""
    kept = model.generation_config
    ids = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = kept


def counted(decoded: list[list[Event]]) -> dict:
    """Tokens per step of some prompts, and of what it is made."""
    steps = sum(map(len, decoded))
    tokens = sum(len(event.committed) for events in decoded for event in events)
    return {"tokens_per_step": tokens / max(steps, 1), "steps": steps, "tokens": tokens, "prompts": len(decoded)}


def by_category(prompts: Prompts, decoded: list[list[Event]]) -> dict[str, dict]:
    """The same for each category."""
    groups: dict[str, list[list[Event]]] = {}
    for (category, _), events in zip(prompts, decoded):
        groups.setdefault(category, []).append(events)
    return {category: counted(own) for category, own in groups.items()}
