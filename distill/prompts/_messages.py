"""From a stored conversation to what its user said: OpenAI-style messages, ShareGPT-style conversations, plain text."""

from collections.abc import Mapping
from typing import Any

from inference.errors import InputError

# ShareGPT names its speakers `human` and `gpt`; exports by other tools use the rest.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
LAYOUTS = (
    "use {'messages': [{'role': ..., 'content': ...}]}, {'conversations': [{'from': ..., 'value': ...}]} "
    "or {'prompt': ...}"
)


def record_turns(record: Any, *, where: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the system message (or None) and the user's turns of one stored conversation.

    Args:
        record: an object with `messages`, `conversations` or `prompt`.
        where: file and line, for the error.

    Raises:
        InputError: the record has none of these keys, an unknown role, or no user turn.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"expected an object, got {type(record).__name__}", where=where, mend=LAYOUTS)
    for key in ("messages", "conversations", "prompt"):
        if record.get(key) is not None:
            return conversation_turns(record[key], where=where)
    raise InputError(f"no messages, conversations or prompt among the keys {sorted(record)}", where=where, mend=LAYOUTS)


def conversation_turns(value: Any, *, where: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the system message and the user's turns of a text, a list of texts, or a list of messages.

    Answers in the data are dropped: the target writes its own.

    Raises:
        InputError: another layout, an unknown role, an empty turn, or no user turn at all.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise InputError(
            f"expected a text or a list of messages, got {type(value).__name__}", where=where, mend=LAYOUTS
        )
    system: list[str] = []
    turns: list[str] = []
    for item in value:
        role, text = ("user", item) if isinstance(item, str) else _message(item, where=where)
        if role == "system" and text.strip():
            system.append(text)
        elif role == "user":
            if not text.strip():
                raise InputError("a user turn is empty", where=where, mend="give it some text, or drop the record")
            turns.append(text)
    if not turns:
        raise InputError("no user turn", where=where, mend="add a message with role 'user', or drop the record")
    return "\n\n".join(system) or None, tuple(turns)


def _message(item: Any, *, where: str) -> tuple[str, str]:
    if not isinstance(item, Mapping):
        raise InputError(f"a message is a {type(item).__name__}, not an object", where=where, mend=LAYOUTS)
    name = item.get("role", item.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise InputError(f"unknown role {name!r}", where=where, mend=f"use one of {', '.join(sorted(ROLES))}")
    if ROLES[name] == "assistant":
        return "assistant", ""  # dropped, so a call of a tool without text is no error
    return ROLES[name], _text(item.get("content", item.get("value")), where=where)


def _text(content: Any, *, where: str) -> str:
    """Return the text of a message's content: a string, or OpenAI's list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise InputError(
        f"a message's content is not text ({type(content).__name__})", where=where, mend="keep text messages only"
    )
