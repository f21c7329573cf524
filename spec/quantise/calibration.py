"""Texts to calibrate on and others to measure on, from a file of conversations, texts or prompts.

A conversation that ends with an answer, and a plain text, are taken as they are; a prompt is answered by the model
itself, so that it is calibrated on what it will write. Knows nothing of quantisation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.content import Unfit
from ..data.forms import Record
from ..data.reading import Reading
from ..prompts import check_ids, templated_ids
from ..serve.texts import Text, decode_texts
from ..target.load import context_length
from .quality import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 256  # tokens of a text, at most
ANSWER = 200  # tokens of an answer, at most
SHORTEST = 32  # tokens of a text, at least
TEMPERATURE, TOP_P = 1.0, 0.95  # of the model's own answers


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one source, no two of them alike."""

    calibration: list[list[int]]  # token ids
    held_out: list[HeldOut]


def read_records(reading: Reading, count: int) -> list[Record]:
    """`count` texts to calibrate on and half as many to measure on, evenly spread over a source, each once; fewer where
    it is short, in the same proportion."""
    # Other answers to one prompt would be alike.
    return reading.spread(count + max(1, count // 2), _with_text, key=_told_by)


def _with_text(record: Record) -> Record:
    if not _told_by(record).strip():
        raise Unfit("it has no text of a user, nor a text of its own")
    return record


def _told_by(record: Record) -> str:
    """The text by which a record is told from others."""
    return record.text if record.text is not None else next(iter(record.turns), "")


def read_texts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", records: list[Record], name: str
) -> Texts:
    """The texts of records of the source `name`; one that the model cannot read is left out.

    Raises ValueError for less than two texts of 32 tokens."""
    read = [_as_it_is(tokenizer, record) for record in records]
    asked = [number for number, text in enumerate(read) if text is None]
    answers = _answered(model, tokenizer, [records[number] for number in asked])
    for number, answer in zip(asked, answers):
        read[number] = answer
    length = min(LENGTH, context_length(model) or LENGTH)
    texts = [HeldOut(text.tokens[:length], text.begin) for text in read if text is not None]
    texts = [text for text in texts if len(text.tokens) >= max(SHORTEST, text.begin + 1) and _is_known(text, model)]
    if len(texts) < 2:
        raise ValueError(
            f"{name} holds {len(texts)} texts of at least {SHORTEST} tokens that the model knows and two are needed, "
            "one to calibrate on and one to measure on; give a dozen or more"
        )
    held_out = texts[1::3]  # between those that are calibrated on, as a file may be sorted
    return Texts([text.tokens for number, text in enumerate(texts) if number % 3 != 1], held_out)


def _is_known(text: HeldOut, model: "PreTrainedModel") -> bool:
    try:
        check_ids(text.tokens, model)
    except Unfit:
        return False
    return True


def _as_it_is(tokenizer: "PreTrainedTokenizerBase", record: Record) -> HeldOut | None:
    """A text, or a conversation whose last answer counts; None for what is to be answered."""
    if record.text is not None:
        return HeldOut(tokenizer(record.text)["input_ids"], 1)
    messages = list(record.messages)
    if messages[-1]["role"] != "assistant" or not tokenizer.chat_template:
        return None
    try:
        before = templated_ids(tokenizer, messages[:-1], record.tools)
        whole = tokenizer.apply_chat_template(messages, tools=record.tools, return_dict=True)["input_ids"]
    except Exception:  # whatever a template raises for messages that it does not take
        return HeldOut([], 1)
    return HeldOut(whole, len(before) if whole[: len(before)] == before else 1)


def _answered(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", records: list[Record]
) -> list[HeldOut | None]:
    """Each record's first prompt with the model's own answer; None where it does not fit into the context."""
    made: list[HeldOut | None] = [None] * len(records)
    room = context_length(model) or 1 << 30

    def finish(text: Text, tokens: list[int], failed: bool) -> None:
        made[text.name] = None if failed else HeldOut([*text.tokens, *tokens], len(text.tokens))

    texts = []
    for number, record in enumerate(records):
        try:
            tokens = _prompt_ids(tokenizer, record)
            check_ids(tokens, model, ANSWER)
        except Unfit:
            continue
        if len(tokens) + ANSWER <= min(room, 4 * LENGTH):
            texts.append(Text(tokens, ANSWER, number, len(tokens) + ANSWER, number))
    decode_texts(model, texts, finish, batch=16, temperature=TEMPERATURE, top_p=TOP_P, executor="eager")
    return made


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", record: Record) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(_told_by(record))["input_ids"]
    roles = [message["role"] for message in record.messages]
    asked = (number for number in range(1, len(roles)) if roles[number - 1] == roles[number] == "user")  # unanswered
    return templated_ids(tokenizer, record.messages[: next(asked, len(roles))], record.tools)
