"""Texts to calibrate on and others to measure on, from a file of conversations, texts or prompts.

A conversation that ends with an answer, and a plain text, are taken as they are; a prompt is answered by the model
itself, so that it is calibrated on what it will write. Knows nothing of quantisation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..prompts import templated_ids
from ..refill import Text, decode_texts
from ..target.load import context_length
from .quality import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 256  # tokens of a text, at most
ANSWER = 200  # tokens of an answer, at most
SHORTEST = 32  # tokens of a text, at least
TEMPERATURE, TOP_P = 1.0, 0.95  # of the model's own answers
EXAMPLE = '{"prompt": "Why is the sky blue?"}'


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one file, no two of them alike."""

    calibration: list[list[int]]  # token ids
    held_out: list[HeldOut]


def read_entries(path: str) -> list[dict]:
    """The entries of a JSONL file, each once, with `messages`, `text`, `turns` or `prompt`. Raises ValueError for a
    file that cannot be read, and for a line that is none of these."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"calibration file {path} cannot be read ({reason}); give a JSONL file") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            entry = _entry(f"{path}, line {number}", line)
            entries[json.dumps(_first_user_turn(entry))] = entry  # other answers to one prompt would be alike
    return list(entries.values())


def _entry(where: str, line: str) -> dict:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}); an entry is a line such as {EXAMPLE}") from error
    text = _first_user_turn(entry) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text in 'messages', 'text', 'turns' or 'prompt'; write it like {EXAMPLE}")
    return entry


def _first_user_turn(entry: dict) -> Any:
    """The text by which an entry is told from others; None where there is none."""
    try:
        if "messages" in entry:
            assert all(isinstance(message["content"], str) for message in entry["messages"])
            return next(message["content"] for message in entry["messages"] if message["role"] == "user")
        return entry["turns"][0] if "turns" in entry else entry.get("text", entry.get("prompt"))
    except (TypeError, KeyError, IndexError, StopIteration, AssertionError):
        return None


def spread(entries: list[dict], most: int) -> list[dict]:
    """At most `most` entries, evenly spread."""
    most = min(most, len(entries))
    return [entries[number * len(entries) // most] for number in range(most)]


def read_texts(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", path: str, count: int) -> Texts:
    """`count` texts to calibrate on and half as many to measure on, evenly spread over a file; fewer where it is short,
    in the same proportion.

    Raises ValueError for a file without at least two texts of 32 tokens."""
    entries = spread(read_entries(path), count + max(1, count // 2))
    read = [_as_it_is(tokenizer, entry) for entry in entries]
    asked = [number for number, text in enumerate(read) if text is None]
    answers = _answered(model, tokenizer, [entries[number] for number in asked])
    for number, answer in zip(asked, answers):
        read[number] = answer
    texts = [HeldOut(text.tokens[:LENGTH], text.begin) for text in read if text is not None]
    texts = [text for text in texts if len(text.tokens) >= max(SHORTEST, text.begin + 1)]
    if len(texts) < 2:
        raise ValueError(
            f"{path} holds {len(texts)} texts of at least {SHORTEST} tokens and two are needed, one to calibrate on "
            "and one to measure on; give a dozen or more"
        )
    held_out = texts[1::3]  # between those that are calibrated on, as a file may be sorted
    return Texts([text.tokens for number, text in enumerate(texts) if number % 3 != 1], held_out)


def _as_it_is(tokenizer: "PreTrainedTokenizerBase", entry: dict) -> HeldOut | None:
    """A text, or a conversation whose last answer counts; None for what is to be answered."""
    if "text" in entry:
        return HeldOut(tokenizer(entry["text"])["input_ids"], 1)
    messages = entry.get("messages", [])
    if not messages or messages[-1]["role"] != "assistant" or not tokenizer.chat_template:
        return None
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    before = templated_ids(tokenizer, messages[:-1])
    return HeldOut(whole, len(before) if whole[: len(before)] == before else 1)


def _answered(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", entries: list[dict]
) -> list[HeldOut | None]:
    """Each entry's first prompt with the model's own answer; None where it does not fit into the context."""
    made: list[HeldOut | None] = [None] * len(entries)
    room = context_length(model) or 1 << 30

    def finish(text: Text, tokens: list[int], failed: bool) -> None:
        made[text.name] = None if failed else HeldOut([*text.tokens, *tokens], len(text.tokens))

    texts = []
    for number, entry in enumerate(entries):
        tokens = _prompt_ids(tokenizer, entry)
        if len(tokens) + ANSWER <= min(room, 4 * LENGTH):
            texts.append(Text(tokens, ANSWER, number, len(tokens) + ANSWER, number))
    decode_texts(model, texts, finish, batch=16, temperature=TEMPERATURE, top_p=TOP_P, executor="eager")
    return made


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", entry: dict) -> list[int]:
    prompt = _first_user_turn(entry)
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = entry.get("messages") or [{"role": "user", "content": prompt}]
    return templated_ids(tokenizer, messages[:-1] if messages[-1]["role"] == "assistant" else messages)
