"""One served request as the log keeps it: who asked for what, and what speculation made of it. Knows nothing of files.

A record may also stand for an interval of a serving engine's counters, where single requests are not to be had.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from inference.request import Decoded, tree_tokens

SCHEMA_VERSION = 1
ENGINE = "dspark"
"""Source of the records of single requests; any other source's are intervals of counters."""


class NewerSchema(ValueError):
    """A line that a later version wrote."""


@dataclass(frozen=True, kw_only=True)
class TrafficRecord:
    """One request that was served, or one interval of an engine's counters.

    Attributes:
        id: of the request, unique.
        time: of its end, in seconds since 1970 (UTC).
        pair: name and version, as in "smollm2-135m/v3".
        target: digest of the target.
        arm: name of the arm that served it, or of the draft.
        domain: of the prompt, "" where unknown.
        temperature: it was decoded at; -1 where unknown.
        prompt: messages with `role` and `content`, or None where the text is left out.
        prompt_digest: sha256 of the messages' canonical JSON, "" where that is left out too.
        response: the answer's text, or None.
        response_digest: sha256 of the canonical JSON of the answer's text, or "".
        emitted: tokens emitted.
        passes: target passes after the prefill.
        proposed: by position, rounds that verified it.
        accepted: by position, rounds in which it stood.
        seconds: wall-clock seconds of the request, or of the interval.
        source: "dspark" for a request of this engine; "vllm" or "sglang" for an interval of that engine's counters.
        requests: how many are behind the record.
        tree: tokens of the tree that every round proposed; 0 for chains. By position then means by depth.
    """

    id: str
    time: float
    pair: str
    target: str
    arm: str
    domain: str
    temperature: float
    prompt: list[dict[str, str]] | None
    prompt_digest: str
    response: str | None
    response_digest: str
    emitted: int
    passes: int
    proposed: list[int]
    accepted: list[int]
    seconds: float
    source: str = ENGINE
    requests: int = 1
    tree: int = 0

    @property
    def single(self) -> bool:
        """Whether it is one request, which samples may hold, and no interval of counters."""
        return self.source == ENGINE

    @property
    def rate(self) -> float | None:
        """Accepted chain tokens over verified ones; None where none was verified."""
        return sum(self.accepted) / sum(self.proposed) if sum(self.proposed) else None

    @property
    def tau(self) -> float | None:
        """Emitted tokens per target pass; None without a pass."""
        return self.emitted / self.passes if self.passes else None

    def to_json(self) -> str:
        """One line of ASCII, without its end.

        Raises:
            ValueError: a number that JSON has no word for.
        """
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "TrafficRecord":
        """Rebuild a record from its line; keys that are not known are passed over.

        Raises:
            NewerSchema: a later version wrote the line.
            ValueError: it is no record.
        """
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        version = data.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise NewerSchema(f"schema {version}, this code reads {SCHEMA_VERSION}")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema {version!r}, this code reads {SCHEMA_VERSION}")
        try:
            record = cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})
        except TypeError as error:
            raise ValueError(str(error)) from None
        faults = [name for name, holds in _SHAPES.items() if not holds(getattr(record, name))]
        if faults or len(record.proposed) != len(record.accepted):
            raise ValueError(f"values out of shape: {', '.join(faults) or 'proposed and accepted differ in length'}")
        return record


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(item) for item in value)


def _are_messages(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


_SHAPES = {
    **dict.fromkeys(
        ("id", "pair", "target", "arm", "domain", "prompt_digest", "response_digest", "source"),
        _is_text,
    ),
    **dict.fromkeys(("time", "temperature", "seconds"), _is_number),
    **dict.fromkeys(("emitted", "passes", "requests", "tree"), _is_count),
    **dict.fromkeys(("proposed", "accepted"), _are_counts),
    "prompt": _are_messages,
    "response": _is_text_or_none,
}


def text_digest(value: str | list[dict[str, str]]) -> str:
    """Hex sha256 of the canonical JSON (keys sorted, no spaces, ASCII) of a text or of messages.

    It tells equal texts from different ones. It hides nothing from someone who guesses the text.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A user's message, or messages, as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def pair_label(info: Mapping[str, Any]) -> str:
    """Name and version of a pair from its `pair.json`, as in "smollm2-135m/v3"; "" for one that was never published."""
    return "/".join(str(info[key]) for key in ("name", "version") if info.get(key))


def record_from(
    decoded: Decoded,
    *,
    request_id: str,
    pair: str,
    target: str,
    arm: str,
    domain: str,
    temperature: float,
    prompt: str | list[dict[str, str]],
    response: str,
    seconds: float | None = None,
    at: float | None = None,
) -> TrafficRecord:
    """Bring what a decoder or the batch engine counted into a record; see `TrafficRecord` for the rest.

    Args:
        decoded: what the request gave.
        request_id: unique; becomes `id`.
        pair: name and version.
        target: digest of the target.
        arm: that served it.
        domain: of the prompt, or "".
        temperature: it was decoded at.
        prompt: a user's message, or messages.
        response: the answer's text.
        seconds: what the request took. None takes the decoder's own, which the batch engine does not tell apart by
            request.
        at: seconds since 1970, None is now.
    """
    messages = as_messages(prompt)
    return TrafficRecord(
        id=request_id,
        time=time.time() if at is None else at,
        pair=pair,
        target=target,
        arm=arm,
        domain=domain,
        temperature=float(temperature),
        prompt=messages,
        prompt_digest=text_digest(messages),
        response=response,
        response_digest=text_digest(response),
        emitted=len(decoded.tokens),
        passes=decoded.passes,
        proposed=list(decoded.proposed),
        accepted=list(decoded.accepted),
        seconds=round(decoded.total_seconds if seconds is None else seconds, 6),
        tree=tree_tokens(decoded.blocks, depth=len(decoded.proposed)),
    )
