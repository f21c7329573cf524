"""Prompts for measurements: JSONL with `turns` or `prompt`, optionally `id` and `category`; and their token ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE = '{"prompt": "Why is the sky blue?"}'


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    id: str
    category: str
    turns: tuple[str, ...]


def read_bench_prompts(path: str, most: int | None = None) -> list[BenchPrompt]:
    """The prompts of a file, at most `most`, evenly spread over it. Raises ValueError for a file that has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"prompts file {path} cannot be read ({reason}); give a JSONL file") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt(f"{path}, line {number}", count, line) for count, (number, line) in enumerate(filled, 1)]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; each line of it is one, such as {EXAMPLE}")
    repeated = {prompt.id for prompt in prompts if sum(prompt.id == twin.id for twin in prompts) > 1}
    if repeated:
        raise ValueError(f"{path}: id {min(repeated)} stands in several lines; give every prompt its own id")
    if most is None or most >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // most] for i in range(most)]


def _prompt(where: str, count: int, line: str) -> BenchPrompt:
    """The prompt of a line, the `count`th of its file; `where` names the line in messages."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        said = f"{error.msg}, column {error.colno}"
        raise ValueError(f"{where} is no JSON ({said}); a prompt is a line such as {EXAMPLE}") from error
    if not isinstance(entry, dict) or not {"turns", "prompt"} & entry.keys():
        has = f"has {', '.join(entry) or 'nothing'}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
        raise ValueError(f"{where} {has}; a prompt is a line such as {EXAMPLE}, or one with 'turns', a list of texts")
    turns = entry["turns"] if "turns" in entry else [entry["prompt"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise ValueError(f"{where} has an empty prompt, or one that is no text; give it text, or remove the line")
    return BenchPrompt(str(entry.get("id", count)), str(entry.get("category", "all")), tuple(turns))


def conversation_ids(tokenizer: "PreTrainedTokenizerBase", turns: list[str]) -> list[int]:
    """Token ids of a conversation in which user and assistant alternate and the user is last; without a chat template
    the turns are joined by line breaks."""
    if not tokenizer.chat_template:
        return tokenizer("\n".join(turns) if len(turns) > 1 else turns[0])["input_ids"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return templated_ids(tokenizer, messages)


def templated_ids(tokenizer: "PreTrainedTokenizerBase", messages: list[dict]) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the next answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


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
