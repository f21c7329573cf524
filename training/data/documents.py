"""Documents: token ids and a loss mask, from conversations and from raw text.

In a conversation the loss is on the target's answers, end-of-turn tokens included. They are located by the recorded
token ids if there are any, else by the chat template's generation markers, else as the difference between the
conversation templated up to an answer and templated with it; never by searching in text. In raw text the loss is on
every token. Knows nothing of packing.
"""

import contextlib
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".tex", ".html")
JSONL_SUFFIXES = (".jsonl", ".jsonl.xz")
TOGETHER = 256  # raw texts tokenized in one call


@dataclass(frozen=True, slots=True)
class Document:
    tokens: list[int]
    loss: list[int]  # 0 or 1 for each token
    key: str  # decides between train and held-out: a conversation's user turns, or the raw text
    turns: tuple[str, ...] = ()  # the user's, of a conversation


class Unfit(ValueError):
    """A record that cannot become a document; it is left out and counted."""


@dataclass(slots=True)
class Reader:
    """Turns records into documents. `ends` are the ids that end the target's turn."""

    tokenizer: object
    ends: frozenset[int]

    def documents(self, records: Iterable[dict]) -> Iterator[Document | Unfit]:
        texts: list[str] = []
        for record in records:
            if "text" in record:
                texts.append(record["text"])
                if len(texts) == TOGETHER:
                    yield from self._raw(texts)
                    texts = []
                continue
            try:
                yield self._conversation(record)
            except Unfit as error:
                yield error
        yield from self._raw(texts)

    def _raw(self, texts: list[str]) -> Iterator[Document | Unfit]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        for text, tokens in zip(texts, self.tokenizer(texts)["input_ids"] if texts else ()):
            if not text.strip():
                yield Unfit("an empty text")
                continue
            tokens = tokens if tokens[-1:] == end else [*tokens, *end]
            yield Document(tokens, [1] * len(tokens), text)

    def _conversation(self, record: dict) -> Document:
        messages = record.get("messages")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise Unfit("'messages' is no list of objects with 'role' and 'content'")
        if not any(message["role"] == "assistant" for message in messages):
            raise Unfit("no assistant turn")
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template and the data has conversations; prepare raw text instead"
            )
        recorded, finished = record.get("token_ids"), record.get("finished", True)
        if recorded is not None and len(recorded) != sum(message["role"] == "assistant" for message in messages):
            raise Unfit("'token_ids' has not one list of tokens for each answer")
        try:
            if recorded is None and "{% generation" in self.tokenizer.chat_template.replace("{%-", "{%"):
                tokens, loss = self._marked(messages)
            else:
                tokens, loss = self._spans(messages, recorded)
        except Unfit:
            raise
        except Exception as error:  # whatever a template raises for messages that it does not take
            raise Unfit(f"the chat template refuses a conversation ({error})") from error
        if not finished:
            tokens, loss = self._without_end(tokens, loss)
        key = json.dumps([message["content"] for message in messages if message["role"] != "assistant"])
        return Document(tokens, loss, key, tuple(m["content"] for m in messages if m["role"] == "user"))

    def _marked(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        made = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return made["input_ids"], made["assistant_masks"]

    def _spans(self, messages: list[dict], recorded: list[list[int]] | None) -> tuple[list[int], list[int]]:
        """Tokens and loss mask, tokenized in pieces that begin and end with every answer, as in decoding."""
        tokens: list[int] = []
        loss: list[int] = []
        text, answers = "", 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:index], add_generation_prompt=True)
            after = self._rendered(messages[: index + 1])
            if not before.startswith(text) or not after.startswith(before):
                raise Unfit("the chat template rewrites earlier turns, so answers cannot be told apart")
            context = self._tokenized(before[len(text) :], text, tokens)
            tokens += context
            loss += [0] * len(context)
            answer = self._tokenized(after[len(before) :], before, tokens)
            said = next((i + 1 for i, token in enumerate(answer) if token in self.ends), len(answer))
            spoken = answer[:said] if recorded is None else recorded[answers]
            rest = answer[said:] if spoken[-1:] and spoken[-1] in self.ends else []
            tokens += [*spoken, *rest]
            loss += [1] * len(spoken) + [0] * len(rest)
            text, answers = after, answers + 1
        return tokens, loss

    def _rendered(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _tokenized(self, text: str, before: str, known: list[int]) -> list[int]:
        """The tokens of `text` after `before`: tokenized together where that keeps the `known` tokens of `before`."""
        whole = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if whole[: len(known)] == known:
            return whole[len(known) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _without_end(self, tokens: list[int], loss: list[int]) -> tuple[list[int], list[int]]:
        """Remove what the template added after an answer that was cut off."""
        last = max((index for index, counts in enumerate(loss) if counts), default=-1)
        stop = last if last >= 0 and tokens[last] in self.ends else last + 1
        return tokens[:stop], loss[:stop]


def read_records(sources: Iterable[str | Path]) -> Iterator[dict | Unfit]:
    """Records with `messages` or `text` of JSONL (also `.jsonl.xz`) and text files and of the folders that hold them,
    in a fixed order.

    Raises ValueError for a source that does not exist or is neither, and for a damaged one."""
    for path in source_files(sources):
        if not path.name.endswith(JSONL_SUFFIXES):
            try:
                yield {"text": path.read_text(encoding="utf-8")}
            except UnicodeDecodeError:
                yield Unfit(f"{path.name} is no UTF-8 text")
            continue
        with _unpacked(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(line.decode("utf-8", errors="replace"), f"{path.name}:{number}")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def unpacked_size(path: Path) -> int:
    """Bytes of the text in a source file, which may be compressed."""
    with _unpacked(path) as file:
        return file.seek(0, 2)


def _record(line: str, location: str) -> dict | Unfit:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Unfit(f"{location}: no JSON ({error})")
    if not isinstance(record, dict) or not ("messages" in record or isinstance(record.get("text"), str)):
        return Unfit(f"{location}: neither 'messages' nor 'text'")
    return record


def source_files(sources: Iterable[str | Path]) -> list[Path]:
    """The files behind `sources`, folders searched in order of names."""
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.name.endswith((*TEXT_SUFFIXES, *JSONL_SUFFIXES)))
            files += [path for path in inside if path.is_file()]
        elif source.is_file():
            files.append(source)
        else:
            raise ValueError(f"{source} does not exist; give JSONL or text files, or folders of them")
    return files


def file_fingerprint(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
