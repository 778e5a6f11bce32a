"""What one request under one arm left behind: the unit that every published figure is computed from."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from inference.request import Decoded


@dataclass(frozen=True)
class Mismatch:
    """Where greedy output left the target-only output.

    Attributes:
        position: index of the first differing token.
        margin: how far the less likely of the two tokens lies under the target's best logit there.
        near_tie: whether neither answer had ended there and the margin is within the tolerance of the arithmetic, so
            that rounding explains it.
    """

    position: int
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class Record:
    """One request under one arm.

    Attributes:
        prompt_id: of the prompt.
        domain: of the prompt.
        temperature: it was decoded at.
        arm: name of the draft, `none` for target-only.
        order: position of this arm among the arms on this prompt, from 0.
        prompt_tokens: length of the prompt.
        emitted: tokens emitted.
        passes: target passes after the prefill.
        proposed: by position, rounds that verified it.
        accepted: by position, rounds in which it stood.
        siblings: by position and rank, rounds in which a sibling stood in its place.
        blocks: by block length, rounds.
        seconds: by part (`inference.request.PARTS`).
        draft_bytes: weights and caches of the draft.
        target_bytes: weights of the target and its cache.
        digest: first 16 hex of the sha256 of the emitted token ids.
        mismatch: at temperature 0, where it left the target-only output, or None.
    """

    prompt_id: str
    domain: str
    temperature: float
    arm: str
    order: int
    prompt_tokens: int
    emitted: int
    passes: int
    proposed: list[int]
    accepted: list[int]
    blocks: dict[str, int]
    seconds: dict[str, float]
    draft_bytes: int
    target_bytes: int
    digest: str
    mismatch: Mismatch | None = field(default=None)
    siblings: list[list[int]] = field(default_factory=list)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Rebuild a record from its line."""
        data: dict[str, Any] = json.loads(line)
        if data["mismatch"] is not None:
            data["mismatch"] = Mismatch(**data["mismatch"])
        return cls(**data)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds, prefill included."""
        return sum(self.seconds.values())


def tokens_digest(tokens: list[int]) -> str:
    """First 16 hex digits of the sha256 of token ids."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def record_of(
    decoded: Decoded,
    *,
    prompt_id: str,
    domain: str,
    temperature: float,
    arm: str,
    order: int,
    prompt_tokens: int,
    draft_bytes: int,
    target_bytes: int,
    mismatch: Mismatch | None,
) -> Record:
    """Bring what the decoder counted into a record; see `Record` for the arguments."""
    return Record(
        prompt_id=prompt_id,
        domain=domain,
        temperature=temperature,
        arm=arm,
        order=order,
        prompt_tokens=prompt_tokens,
        emitted=len(decoded.tokens),
        passes=decoded.passes,
        proposed=decoded.proposed,
        accepted=decoded.accepted,
        siblings=decoded.siblings,
        blocks={str(length): rounds for length, rounds in sorted(decoded.blocks.items())},
        seconds={part: round(value, 7) for part, value in decoded.seconds.items()},
        draft_bytes=draft_bytes,
        target_bytes=target_bytes + decoded.cache_nbytes,
        digest=tokens_digest(decoded.tokens),
        mismatch=mismatch,
    )
