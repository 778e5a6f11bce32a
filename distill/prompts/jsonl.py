"""Prompts from your own file: one JSON object a line with `messages`, `conversations` (ShareGPT style) or `prompt`.

Not a reader of answers: assistant turns are dropped, user turns and the system message are kept. An example:
`{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}`. An `id` names the prompt, a `domain`
says what it is about where that is not the same for the whole file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.prompts import Prompt, SourceConfig, SourceContext
from distill.prompts._messages import record_turns
from inference.errors import InputError


@dataclass
class Config(SourceConfig):
    """A JSONL file of conversations."""

    kind: str = "jsonl"
    path: str = ""
    """The file: one JSON object a line, UTF-8."""

    def read(self, context: SourceContext) -> list[Prompt]:
        """Read every line; raises as `prompts` does."""
        return self.prompts()

    def prompts(self) -> list[Prompt]:
        """Every line's prompt.

        Raises:
            InputError: no such file, no prompt in it, or a malformed line (the message names the line).
        """
        if not self.path:
            raise InputError("no file given", where="prompts (kind jsonl): path", mend="set path to a JSONL file")
        prompts: list[Prompt] = []
        for number, line in enumerate(_lines(Path(self.path)), start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            record = _record(line, where=where)
            system, turns = record_turns(record, where=where)
            name = f"line-{number}" if record.get("id") is None else str(record["id"])
            domain = str(record.get("domain") or self.domain)
            prompts.append(Prompt(name, domain, self.kind, turns, system=system, heldout=self.heldout))
        if not prompts:
            raise InputError("the file holds no prompts", where=self.path, mend="put one JSON object on each line")
        return prompts


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read the file: {reason}", where=str(path), mend="check path") from error


def _record(line: bytes, *, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}", where=where, mend="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=where,
            mend="write one whole JSON object on each line",
        ) from error
    except RecursionError as error:
        raise InputError("JSON nested too deeply", where=where, mend="write one flat object on each line") from error
