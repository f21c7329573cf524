"""What an entry says: a `Record`, whichever of the usual forms it has.

A form is told by its fields, those that are null left aside; `columns` names other fields in the place of ours. Knows
nothing of files, templates and tokens.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from .content import Unfit

EXAMPLE = '{"prompt": "Why is the sky blue?"}'
ROLES = {
    "human": "user", "prompter": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "assistant": "assistant",
    "system": "system", "developer": "developer",
    "observation": "tool", "function_response": "tool", "tool": "tool",
}  # fmt: skip
CALL = "function_call"  # the role by which ShareGPT marks an assistant's call
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # of a message, beside role and content
_ANSWERS = ("completion", "output", "response")


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation, or a raw text; one of `messages` and `text` is there.

    A message has `role`, `content` (a text) and perhaps `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    `token_ids` are of each answer as the target gave it, and `finished` is false where the last one was cut."""

    number: int  # of its source, from 1
    where: str  # in its source, such as "line 3"
    form: str  # as people call it
    messages: tuple[dict, ...] = ()
    text: str | None = None
    tools: list | None = None
    id: str | None = None
    category: str = "all"
    source: str | None = None
    token_ids: list[list[int]] | None = None
    finished: bool = True

    @property
    def turns(self) -> tuple[str, ...]:
        """The user's."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {"role": None}
        return first["content"] if first["role"] in ("system", "developer") else None


def parse_columns(text: str | None) -> dict[str, str]:
    """`--columns`: `ours=theirs` with commas between. Raises ValueError for a field that no form has."""
    columns = {}
    for item in filter(None, (text or "").split(",")):
        name, equals, column = (part.strip() for part in item.partition("="))
        if name not in FIELDS or not equals or not column:
            raise ValueError(
                f"--columns: {item!r} is no FIELD=COLUMN with a field of {', '.join(FIELDS)}; write it like "
                "prompt=question,completion=answer"
            )
        columns[name] = column
    return columns


def record(value: Any, number: int, where: str, columns: Mapping[str, str]) -> Record:
    """The record that an entry says. Raises Unfit where it says none."""
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise Unfit(f"it is a JSON {_KINDS.get(type(value), 'value')} and no object")
    renamed = value | {name: value.get(column) for name, column in columns.items()}
    fields = {name: item for name, item in renamed.items() if item is not None}
    name = next((name for name in _FORMS if name in (columns or fields)), None)  # what columns name goes first
    name = name or next((name for name in _FORMS if name in fields), None)
    if name is None or name not in fields:
        has = shorten(", ".join(map(str, value)), 80) or "nothing"
        raise Unfit(f"it has no {columns[name]} (but {has})" if name else f"it is of no known form (it has {has})")
    form, messages = _FORMS[name](fields, name)
    about = _about(fields)
    if messages is None:
        return Record(number, where, form, text=_text(fields["text"], "'text'"), **about)
    return Record(number, where, form, _with_system(messages, fields), tools=_tools(fields.get("tools")), **about)


_KINDS = {str: "text", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _about(fields: dict) -> dict:
    about: dict[str, Any] = {name: str(fields[name]) for name in ("id", "category", "source") if name in fields}
    finished, ids = fields.get("finished", True), fields.get("token_ids")
    if not isinstance(finished, bool):
        raise Unfit("'finished' is neither true nor false")
    whole = ids is None or (
        isinstance(ids, list)
        and all(isinstance(answer, list) for answer in ids)
        and all(type(token) is int and token >= 0 for answer in ids for token in answer)
    )
    if not whole:
        raise Unfit("'token_ids' is no list with a list of token ids for each answer")
    return about | {"finished": finished, "token_ids": ids}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{name} is no text")
    return value


# Forms: from the fields, and the one by which the form was told, to what it is called and its messages.

Form = tuple[str, list[dict] | None]


def _chat(fields: dict, name: str) -> Form:
    messages, foreign = _messages(fields[name], f"'{name}'")
    return "ShareGPT" if foreign else "messages", messages


def _turns(fields: dict, name: str) -> Form:
    turns = fields["turns"]
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return _chat(fields, name)
    if not isinstance(turns, list) or not turns:
        raise Unfit("'turns' is no list of a user's texts")
    return "turns", [{"role": "user", "content": _text(turn, "a user turn")} for turn in turns]


def _instruction(fields: dict, name: str) -> Form:
    messages = []
    history = fields.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unfit("'history' is no list of pairs")
    for asked, said in history:
        messages += [_said("user", asked, "'history'"), _said("assistant", said, "'history'")]
    parts = [_text(fields["instruction"], "'instruction'")]
    parts += [_text(fields[name], f"'{name}'") for name in ("input", "context") if name in fields]
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    answer = next((name for name in _ANSWERS if name in fields), None)
    return "Alpaca", messages + ([_said("assistant", fields[answer], f"'{answer}'")] if answer else [])


def _prompt(fields: dict, name: str) -> Form:
    answer = next((name for name in _ANSWERS if name in fields), None)
    messages = _side(fields["prompt"], "user", "'prompt'")
    if answer is None:
        return "prompts", messages
    return "prompt/completion", messages + _side(fields[answer], "assistant", f"'{answer}'")


def _raw(fields: dict, name: str) -> Form:
    return "text", None


_FORMS: Mapping[str, Callable[[dict, str], Form]] = {
    "messages": _chat,
    "conversations": _chat,
    "conversation": _chat,
    "turns": _turns,
    "instruction": _instruction,
    "prompt": _prompt,
    "text": _raw,
}
FIELDS = (*_FORMS, "completion", "input", "output", "history", "system", "tools", "id", "category", "source")


def _side(value: Any, role: str, name: str) -> list[dict]:
    """A prompt or a completion: a text, or messages."""
    return _messages(value, name)[0] if isinstance(value, list) else [_said(role, value, name)]


def _said(role: str, value: Any, name: str) -> dict:
    return {"role": role, "content": _text(value, name)}


# Messages.


def _messages(value: Any, name: str) -> tuple[list[dict], bool]:
    """Messages as chat templates take them, and whether they have `from` and `value`."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Unfit(f"{name} is no list of messages")
    return [_message(message) for message in value], any("from" in message for message in value)


def _message(given: dict) -> dict:
    given = {key: item for key, item in given.items() if item is not None}
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or ("role" not in given and role not in (*ROLES, CALL)):
        raise Unfit(f"the role of a message is not known ({role!r})")
    message = {"role": ROLES.get(role, role), **{key: given[key] for key in _KEPT if key in given}}
    content = given.get("content", given.get("value"))
    if role == CALL:
        message |= {"role": "assistant", "tool_calls": [_loaded(content, "a function call")]}
        content = ""
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"])
    if content is None and not message.get("tool_calls"):
        raise Unfit("a message has no content")
    return message | {"content": "" if content is None else _content(content)}


def _content(content: Any) -> str:
    """A text, or the texts of content parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unfit("the content of a message is no text")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unfit(f"a part of a message is no text (but {kind})")
    return "".join(part["text"] for part in parts)


def _calls(calls: Any) -> list[dict]:
    """Tool calls whose arguments are objects, as chat templates expect them; OpenAI writes them as JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unfit("'tool_calls' is no list of calls")
    made = []
    for call in calls:
        function = dict(call["function"] if isinstance(call.get("function"), dict) else call)
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _loaded(function["arguments"] or "{}", "the arguments of a tool call")
        made.append({**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function})
    return made


def _loaded(text: Any, name: str) -> dict:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unfit(f"{name} is no JSON object")
    return value


def _tools(tools: Any) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise Unfit("'tools' is no JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unfit("'tools' is no list of objects")
    return tools or None


def _with_system(messages: list[dict], fields: dict) -> tuple[dict, ...]:
    """The messages behind the system text that stands beside them, if they begin with none."""
    system = next((_text(fields[name], f"'{name}'") for name in ("system", "system_prompt") if name in fields), "")
    if system.strip() and messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": system}, *messages)
    return tuple(messages)
