"""Between messages and token ids, through the tokenizer's own chat template and nothing else.

No marker of any chat format is written here: what opens a turn, what closes it and which tokens are the assistant's are
all read off renderings of the template, by placing a sentinel text where a message goes. Nothing here generates.

A conversation with the target keeps the ids the target wrote: start with `render_prompt`, append the response ids, then
what `follow_up` returns, the next response ids, and so on. Retokenizing the decoded text could give other ids than the
target was conditioned on.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from inference.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Letters and digits only: templates that trim, escape or indent leave it alone, and no text holds it by chance.
SENTINEL = "Zq7dsparkSentinel7qZ"

GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")  # the template marks what the assistant writes


def messages_for(turns: Sequence[str], *, system: str | None = None) -> list[Message]:
    """Return the opening messages of a conversation: the system message, if any, and the first user turn."""
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": turns[0]}]


def render_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, answer: bool) -> str:
    """Render messages as text; `answer` adds what opens the assistant's turn.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses these messages.
    """
    template = _template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        )
    except jinja2.TemplateError as error:
        raise _refused(tokenizer, messages, error) from error


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Return the ids the target answers to: the messages, then what opens the assistant's turn.

    The template writes every special token itself, so the tokenizer adds none: there is never a second BOS.

    Raises:
        InputError: the tokenizer has no chat template, or the template refuses these messages.
    """
    return _encode(tokenizer, render_text(tokenizer, messages, answer=True))[0]


def conversation_tokens(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Return the ids of a whole conversation, and which of them the assistant wrote.

    Where the template marks the assistant's part itself (`{% generation %}`), its marks are used. Otherwise each
    assistant message is the difference between two renderings: the messages before it with the assistant's turn opened,
    and the messages up to and including it. Of that difference, the content and the end-of-turn token are the
    assistant's, since the target writes both; what the template adds behind them (a line break, say) is not.

    Returns:
        ids [T] and mask [T]; True marks a token that begins in the assistant's part. A token that begins in the
        template's part and runs into the assistant's is left out: a target that generates never writes it.

    Raises:
        InputError: no chat template, no fast tokenizer (masks need character offsets), or a template without
            generation marks whose rendering of a message changes with the messages after it.
    """
    text, spans = _assistant_spans(tokenizer, messages)
    ids, offsets = _encode(tokenizer, text)
    mask = [any(begin <= start < stop for begin, stop in spans) for start, _ in offsets]
    return ids, mask


def follow_up(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, response_ids: Sequence[int], user: str
) -> list[int]:
    """Return the ids to append after the target's own response so that it can answer the next user turn.

    That is: what closes the assistant's turn, the user's turn, and what opens the assistant's next turn. If the
    response already ends with the token that closes a turn, that token is not repeated; a response cut off by its
    length limit gets it here. A stop token that this template does not write (some models have several) is for the
    caller to strip.

    Args:
        tokenizer: the target's.
        messages: the conversation so far; the last one is the assistant's, with its decoded text.
        response_ids: the ids the target wrote for that last message.
        user: what the user says next.

    Raises:
        InputError: no chat template, no fast tokenizer, or a template that rewrites or merges assistant text.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("follow_up: the last message is not the assistant's: append the decoded response first")
    stand_in = {"role": "assistant", "content": SENTINEL}
    text = render_text(tokenizer, [*messages[:-1], stand_in, {"role": "user", "content": user}], answer=True)
    tail = _ids_after(tokenizer, text)
    closing = end_of_turn(tokenizer, messages[:-1])
    if closing is not None and response_ids and response_ids[-1] == closing and tail[:1] == [closing]:
        return tail[1:]
    return tail


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message] = ()) -> int | None:
    """Return the token with which the template closes an assistant turn, or None if ordinary text closes it.

    Args:
        tokenizer: the target's.
        messages: the messages before the assistant's turn (default: one user message).
    """
    before = list(messages) or [{"role": "user", "content": "Hi"}]
    text = render_text(tokenizer, [*before, {"role": "assistant", "content": SENTINEL}], answer=False)
    return _closing_token(tokenizer, text)


def user_prefix(tokenizer: "PreTrainedTokenizerBase", *, system: str | None = None) -> list[int]:
    """Return the ids up to the point where the user's first words go: given these, a chat model writes a user's turn.

    Raises:
        InputError: no chat template, no fast tokenizer, or a template that rewrites user text.
    """
    text = render_text(tokenizer, messages_for([SENTINEL], system=system), answer=False)
    cut = _find(text, tokenizer)
    ids, offsets = _encode(tokenizer, text)
    return [token for token, (_, end) in zip(ids, offsets, strict=True) if end <= cut]


def template_markers(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return texts that only the template writes: special tokens, and the marked lines around a turn's content.

    A text that holds one of them was not written inside one turn.
    """
    turn = [{"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}]
    pieces = render_text(tokenizer, [*turn, turn[0]], answer=True).split(SENTINEL)
    lines = {line.strip() for piece in pieces[1:] for line in piece.splitlines()}
    marked = {line for line in lines if len(line) >= 3 and not line.replace(" ", "").isalnum()}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(marked | added | set(tokenizer.all_special_tokens)))


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=tokenizer.name_or_path,
            mend="use an instruction-tuned target, or put a chat_template.jinja into its folder",
        )
    return str(tokenizer.get_chat_template())


def _refused(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], error: Exception) -> InputError:
    roles = ", ".join(message["role"] for message in messages)
    return InputError(
        f"the chat template refuses a conversation with roles {roles} ({error})",
        where=tokenizer.name_or_path,
        mend="leave out the system message or the turns it does not allow",
    )


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids [T] and, for each, the half-open range of characters of `text` it stands for."""
    if not tokenizer.is_fast:
        raise InputError(
            "the tokenizer gives no character offsets",
            where=tokenizer.name_or_path,
            mend="use the target's fast tokenizer (tokenizer.json)",
        )
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def _find(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return where the sentinel starts.

    Raises:
        InputError: the template changed, dropped or repeated it.
    """
    if text.count(SENTINEL) != 1:
        raise InputError(
            f"the chat template writes a message's text {text.count(SENTINEL)} times instead of once",
            where=tokenizer.name_or_path,
            mend="use a template that writes each message as it is",
        )
    return text.index(SENTINEL)


def _ids_after(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of what the template writes behind the sentinel, tokenized in place.

    Tokenized together with what is before it, because some tokenizers put a space in front of any text.
    """
    cut = _find(text, tokenizer) + len(SENTINEL)
    ids, offsets = _encode(tokenizer, text)
    if any(start < cut < end for start, end in offsets):
        raise InputError(
            "what closes a turn in the chat template merges into one token with the text before it",
            where=tokenizer.name_or_path,
            mend="use a template that closes turns with a special token",
        )
    return [token for token, (start, end) in zip(ids, offsets, strict=True) if start >= cut and end > cut]


def _closing_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """Return the token right behind the sentinel if it is a marker of its own in the vocabulary, not ordinary text."""
    ids = _ids_after(tokenizer, text)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _assistant_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and the half-open character ranges the assistant wrote."""
    template = _template(tokenizer)
    if GENERATION.search(template):
        return _marked_spans(tokenizer, messages, template=template)
    text = render_text(tokenizer, messages, answer=False)
    spans = [
        _difference(tokenizer, messages[: index + 1], text=text)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return text, spans


def _marked_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """Let the template mark the assistant's characters itself.

    Rendered by transformers' own function rather than through `return_assistant_tokens_mask`, which marks only the
    first token of a last character that takes several (an emoji in a byte-level vocabulary).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # annotated as if it returned only the text
    try:
        texts, spans = render(
            [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    except jinja2.TemplateError as error:
        raise _refused(tokenizer, messages, error) from error
    return str(texts[0]), [(int(begin), int(stop)) for begin, stop in spans[0]]


def _difference(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, text: str) -> tuple[int, int]:
    """Return which characters of `text` are the last of `messages`, an assistant's: content and end-of-turn token."""
    before = render_text(tokenizer, messages[:-1], answer=True)
    through = render_text(tokenizer, messages, answer=False)
    if not (through.startswith(before) and text.startswith(through)):
        raise InputError(
            f"the chat template renders message {len(messages)} differently once another follows it",
            where=tokenizer.name_or_path,
            mend="add {% generation %} marks to the template, or use single-turn conversations",
        )
    stand_in = {"role": "assistant", "content": SENTINEL}
    probe = render_text(tokenizer, [*messages[:-1], stand_in], answer=False)
    closing = probe[_find(probe, tokenizer) + len(SENTINEL) :]
    if not through.endswith(closing):
        raise InputError(
            f"the chat template closes message {len(messages)} in a way that depends on its text",
            where=tokenizer.name_or_path,
            mend="add {% generation %} marks to the template",
        )
    token = _closing_token(tokenizer, probe)
    ending = "" if token is None else str(tokenizer.convert_ids_to_tokens(token))
    kept = len(ending) if closing.startswith(ending) else 0
    return len(before), len(through) - len(closing) + kept
