"""Which tokens of a conversation are the target's own: token ids and a loss mask, by its chat template.

An answer is what the template writes between asking for it and the end of its turn. It is located by rendering the
conversation up to each answer and with it, never by searching in text; a template's own generation markers narrow it
down where they agree. A template that writes earlier turns in another way than it first did (without their thinking,
with another clock) gives one document for each answer, each behind what decoding saw. Knows nothing of records.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.utils.chat_template_utils import render_jinja_template

from ...spec.data.content import Unfit

Masked = tuple[list[int], list[int]]  # tokens, and for each of them 1 where the loss is on it, else 0

_MARKER = re.compile(r"\{%[-+]?\s*generation\b")
_MARK = "\u241f?\u241f"  # nothing that a template would alter or contain


@dataclass(slots=True)
class Masker:
    """Masks the conversations of a target; `ends` are the ids that end its turn."""

    tokenizer: object
    ends: frozenset[int]

    def documents(
        self,
        messages: Sequence[dict],
        tools: list | None = None,
        recorded: list[list[int]] | None = None,
        finished: bool = True,
    ) -> list[Masked]:
        """One document of all answers, or one for each; `recorded` are the answers' tokens where they are known, and
        without `finished` the last one was cut off. Raises Unfit where an answer cannot be told apart."""
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [self._rendered(messages[:number], tools, add_generation_prompt=True) for number in answers]
        told = [self._rendered(messages[: number + 1], tools) for number in answers]
        if all(map(str.startswith, told, asked)) and all(map(str.startswith, asked[1:], told)):
            marks = self._marks(messages[: answers[-1] + 1], tools, told[-1])
            said = [messages[number]["content"] for number in answers]
            made = [self._together(asked, told, said, marks, recorded)]
        else:
            made = [
                self._alone(messages[: number + 1], tools, asked[turn], told[turn], recorded and recorded[turn])
                for turn, number in enumerate(answers)
            ]
        if not finished:
            made[-1] = self._without_end(*made[-1])
        return made

    def _rendered(self, messages: Sequence[dict], tools: list | None, **options) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)

    # All answers in one document.

    def _together(
        self, asked: list[str], told: list[str], said: list[str], marks: list[tuple[int, int]], recorded: list | None
    ) -> Masked:
        tokens: list[int] = []
        loss: list[int] = []
        text = ""
        for turn, (before, after) in enumerate(zip(asked, told)):
            self._add(before[len(text) :], 0, text, tokens, loss)
            spans = _inside(marks, len(before), len(after))
            marked = "".join(after[start:stop] for start, stop in spans)
            if recorded is None and marked and said[turn].strip() in marked:
                for start, stop, counts in _pieces(spans, len(before), len(after)):
                    self._add(after[start:stop], counts, after[:start], tokens, loss)
            else:
                self._add_answer(after[len(before) :], before, tokens, loss, recorded and recorded[turn])
            text = after
        return tokens, loss

    def _marks(self, messages: Sequence[dict], tools: list | None, text: str) -> list[tuple[int, int]]:
        """Where the template's markers say that the target speaks in `text`; none where it has no markers.

        The characters only: transformers' mask of tokens goes on to the end where a span ends in what has no token."""
        template = self.tokenizer.get_chat_template(None, tools)
        if not _MARKER.search(template):
            return []
        options = {"tools": tools, "chat_template": template, "return_assistant_tokens_mask": True}
        rendered, spans = render_jinja_template([list(messages)], **options, **self.tokenizer.special_tokens_map)
        return spans[0] if rendered[0] == text else []

    def _add(self, text: str, counts: int, before: str, tokens: list[int], loss: list[int]) -> None:
        new = self._tokenized(text, before, tokens)
        tokens += new
        loss += [counts] * len(new)

    def _add_answer(
        self, text: str, before: str, tokens: list[int], loss: list[int], recorded: list[int] | None
    ) -> None:
        """Add an answer, of which what is behind the end of its turn does not count, and nothing where that is all: a
        call of a tool that the template does not write, say."""
        answer = self._tokenized(text, before, tokens)
        said = next((index + 1 for index, token in enumerate(answer) if token in self.ends), len(answer))
        spoken = answer[:said] if recorded is None else recorded
        rest = answer[said:] if spoken[-1:] and spoken[-1] in self.ends else []
        tokens += [*spoken, *rest]
        silent = recorded is None and said == 1 and answer[0] in self.ends
        loss += [0 if silent else 1] * len(spoken) + [0] * len(rest)

    def _tokenized(self, text: str, before: str, known: list[int]) -> list[int]:
        """The tokens of `text` after `before`: tokenized together where that keeps the `known` tokens of `before`."""
        whole = self.tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if whole[: len(known)] == known:
            return whole[len(known) :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # One answer by itself.

    def _alone(
        self, messages: Sequence[dict], tools: list | None, before: str, after: str, recorded: list[int] | None
    ) -> Masked:
        """The last answer of `messages` behind what decoding saw."""
        text = ""
        if recorded is None:
            before, text = self._answer(messages, tools, before, after)
        tokens = self._tokenized(before, "", [])
        loss = [0] * len(tokens)
        if recorded is not None:
            return [*tokens, *recorded], [*loss, *([1] * len(recorded))]
        self._add_answer(text, before, tokens, loss, None)
        return tokens, loss

    def _answer(self, messages: Sequence[dict], tools: list | None, before: str, after: str) -> tuple[str, str]:
        """What is before the last answer, and the answer with the end of its turn."""
        if after.startswith(before):
            return before, after[len(before) :]
        said = messages[-1]["content"]
        common = before[: next((i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), len(after))]
        words = common.startswith(self._rendered(messages[:-1], tools))  # what asks for it has words of its own
        if words and said.strip() and after[len(common) :].lstrip().startswith(said.strip()):
            return common, after[len(common) :]
        marked = self._rendered([*messages[:-1], {**messages[-1], "content": _MARK}], tools)
        _, mark, end = marked.partition(_MARK)
        if not mark or not said.strip():
            raise Unfit("the chat template does not write an answer as it is, so that it cannot be told apart")
        return before, said + end

    def _without_end(self, tokens: list[int], loss: list[int]) -> Masked:
        """Remove what the template added after an answer that was cut off."""
        last = max((index for index, counts in enumerate(loss) if counts), default=-1)
        stop = last if last >= 0 and tokens[last] in self.ends else last + 1
        return tokens[:stop], loss[:stop]


def _inside(spans: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """The spans between two places; none where one of them goes beyond."""
    near = [(first, last) for first, last in spans if first < stop and last > start]
    return near if all(start <= first and last <= stop for first, last in near) else []


def _pieces(spans: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int, int]]:
    """(start, stop, 1 or 0) of what is in spans and what is between them."""
    made = []
    for first, last in spans:
        made += [(start, first, 0), (first, last, 1)]
        start = last
    return [piece for piece in [*made, (start, stop, 0)] if piece[0] < piece[1]]
