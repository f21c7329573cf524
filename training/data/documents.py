"""Documents: token ids and a loss mask, from conversations and from raw text.

In a conversation the loss is on the target's answers, end-of-turn tokens included; in raw text it is on every token.
Knows nothing of packing.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...spec.data.content import Unfit
from ...spec.data.forms import Record
from .masking import Masked, Masker

TOGETHER = 256  # raw texts tokenized in one call


@dataclass(frozen=True, slots=True)
class Document:
    tokens: list[int]
    loss: list[int]  # 0 or 1 for each token
    key: str  # decides between train and held-out: a conversation's user turns, or the raw text
    turns: tuple[str, ...] = ()  # the user's, of a conversation


@dataclass(slots=True)
class Reader:
    """Turns records into documents. `ends` are the ids that end the target's turn; `vocabulary` is how many ids it
    knows, where that is known."""

    tokenizer: object
    ends: frozenset[int]
    vocabulary: int | None = None

    def documents(self, records: Iterable[Record]) -> Iterator[tuple[Record, list[Document] | Unfit]]:
        """Each record, not always in order, with its documents or with why there is none."""
        texts: list[Record] = []
        for record in records:
            if record.text is None:
                yield record, self._checked(self._conversation, record)
                continue
            texts.append(record)
            if len(texts) == TOGETHER:
                yield from self._raw(texts)
                texts = []
        yield from self._raw(texts)

    def _raw(self, records: list[Record]) -> Iterator[tuple[Record, list[Document] | Unfit]]:
        made = self.tokenizer([record.text for record in records])["input_ids"] if records else ()
        for record, tokens in zip(records, made):
            yield record, self._checked(self._text, record, tokens)

    def _checked(self, make, record: Record, *arguments) -> list[Document] | Unfit:
        try:
            documents = make(record, *arguments)
            for document in documents:
                self._check(document)
        except Unfit as error:
            return error
        return documents

    def _check(self, document: Document) -> None:
        if not any(document.loss[1:]):  # a first token is foretold by nothing
            raise Unfit("it has no token to learn from")
        if self.vocabulary is not None and max(document.tokens) >= self.vocabulary:
            raise Unfit(f"it has a token id beyond the target's vocabulary of {self.vocabulary}")

    def _text(self, record: Record, tokens: list[int]) -> list[Document]:
        if not record.text.strip():
            raise Unfit("an empty text")
        return [Document(*self._ended(tokens), record.text)]

    def _ended(self, tokens: list[int], silent: int = 0) -> Masked:
        """Tokens with an end of text; the loss is on all but the first `silent`."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        tokens = tokens if tokens[-1:] == end else [*tokens, *end]
        return tokens, [0] * silent + [1] * (len(tokens) - silent)

    def _conversation(self, record: Record) -> list[Document]:
        messages, recorded = record.messages, record.token_ids
        answers = sum(message["role"] == "assistant" for message in messages)
        if not answers:
            raise Unfit("it has no answer to learn from")
        if recorded is not None and len(recorded) != answers:
            raise Unfit("'token_ids' has not one list of tokens for each answer")
        if self.tokenizer.chat_template:
            made = self._templated(record)
        elif record.form == "prompt/completion" and len(messages) == 2:
            made = [self._continued(*(message["content"] for message in messages))]
        else:
            raise ValueError(
                "the tokenizer has no chat template and the data has conversations; prepare raw text instead"
            )
        key = json.dumps([message["content"] for message in messages if message["role"] != "assistant"])
        return [Document(tokens, loss, key, record.turns) for tokens, loss in made]

    def _templated(self, record: Record) -> list[Masked]:
        masker = Masker(self.tokenizer, self.ends)
        try:
            return masker.documents(record.messages, record.tools, record.token_ids, record.finished)
        except Unfit:
            raise
        except Exception as error:  # whatever a template raises for messages that it does not take
            raise Unfit(f"the chat template refuses a conversation ({error})") from error

    def _continued(self, prompt: str, completion: str) -> Masked:
        """A completion behind its prompt, for a model that does not chat."""
        before = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(prompt + completion)["input_ids"]
        behind = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        tokens = whole if whole[: len(before)] == before else [*before, *behind]
        return self._ended(tokens, len(before))


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 of a tokenizer's definition without its padding and truncation settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        description = tokenizer.get_vocab()
    else:
        description = json.loads(backend.to_str())
        description.pop("truncation", None)
        description.pop("padding", None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
