"""Prompts for measurements, as the one reader gives them; and token ids of conversations."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .data.content import Unfit
from .data.entries import Source
from .data.forms import Record
from .data.reading import Reading
from .target.load import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """The user's turns of a conversation, perhaps behind a system's."""

    id: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None

    def ids(self, tokenizer: "PreTrainedTokenizerBase", said: Sequence[str] = ()) -> list[int]:
        """Token ids up to the answer to come; `said` are the answers before it. Raises Unfit where the chat template
        refuses them."""
        turns = [turn for pair in zip(self.turns, said) for turn in pair] + [self.turns[len(said)]]
        if not tokenizer.chat_template:
            return tokenizer("\n".join(([self.system] if self.system else []) + turns))["input_ids"]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return templated_ids(tokenizer, system + messages)


def read_bench_prompts(
    source: Source, most: int | None = None, columns: Mapping[str, str] | None = None
) -> list[BenchPrompt]:
    """The prompts of a source, at most `most`, evenly spread over it. Raises ValueError where it has none."""
    prompts = Reading(source, columns).spread(most, _bench_prompt)
    (name, count), *_ = Counter(prompt.id for prompt in prompts).most_common(1)
    if count > 1:
        raise ValueError(f"{source.name}: id {name} stands in several lines; give every prompt its own id")
    return prompts


def _bench_prompt(record: Record) -> BenchPrompt:
    turns = user_turns(record)
    return BenchPrompt(str(record.number) if record.id is None else record.id, record.category, turns, record.system)


def user_turns(record: Record) -> tuple[str, ...]:
    """The user's turns. Raises Unfit where there are none, or an empty one."""
    if record.text is not None:
        raise Unfit("it is a text and no prompt")
    if not record.turns:
        raise Unfit("it has no user turn")
    if not all(turn.strip() for turn in record.turns):
        raise Unfit("a user turn is empty")
    return record.turns


def fitting(
    prompts: list[BenchPrompt], tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", new_tokens: int
) -> list[tuple[BenchPrompt, list[int]]]:
    """The prompts whose first turn can be continued by `new_tokens`, with its token ids; how many cannot, and why, is
    said on stderr. Raises ValueError where none can."""
    taken = []
    left_out: Counter[str] = Counter()
    for prompt in prompts:
        try:
            ids = prompt.ids(tokenizer)
            check_ids(ids, model, new_tokens)
            taken.append((prompt, ids))
        except Unfit as error:
            left_out[str(error).partition(" (")[0]] += 1
    reasons = [f"{count:,} prompts: {reason}" for reason, count in left_out.most_common()]
    if not taken:
        raise ValueError(f"no prompt can be decoded ({'; '.join(reasons)}); give others, or ask for fewer new tokens")
    for reason in reasons:
        print(f"left out {reason}", file=sys.stderr)
    return taken


def check_ids(ids: Sequence[int], model: "PreTrainedModel", new_tokens: int = 0, name: str = "it") -> None:
    """Raise Unfit for ids that the model does not know, and for a text that does not fit into its context; `name` is
    what the text is called."""
    if not ids:
        raise Unfit(f"{name} has no token (give at least one)")
    check_known(ids, model, name)
    context = context_length(model)
    if context is not None and len(ids) + new_tokens > context:
        raise Unfit(
            f"{name} does not fit into the model's context of {context} with {new_tokens} new tokens (it has "
            f"{len(ids)}; shorten it, or ask for fewer)"
        )


def check_known(ids: Sequence[int], model: "PreTrainedModel", name: str) -> None:
    """Raise Unfit for ids, at least one, that the model does not know."""
    vocabulary = model.config.get_text_config().vocab_size
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise Unfit(
            f"{name} has a token id beyond the model's vocabulary of {vocabulary} (give ids of its own tokenizer)"
        )


def templated_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict], tools: list | None = None
) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the next answer begins. Raises Unfit where
    the template refuses it."""
    try:
        made = tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # whatever a template raises for messages that it does not take
        raise Unfit(f"the chat template refuses it ({error})") from error
    return made["input_ids"]


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token to pad with: masked, it can be any, so that tokenizers without one do."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def left_padding(mask: torch.Tensor) -> torch.Tensor:
    """How many columns of each row of a mask (B, P) are padding on the left, (B,)."""
    return mask.bool().to(torch.int8).argmax(1)


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (B, P)."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
