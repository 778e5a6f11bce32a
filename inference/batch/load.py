"""An engine under load, as records: what was asked, what became of each request, and of a run as a whole.

`inference.driving` drives and takes the times; what follows from them is `inference.batch.load_figures`.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from inference.records import Mismatch
from inference.request import Request

CLOSED, POISSON, BATCH = "closed", "poisson", "batch"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of a load.

    Attributes:
        prompt_id: of the prompt.
        domain: of the prompt.
        prompt: int64 `[T]`.
        request: sampling, length and stop rules.
        seed: of its random decisions, the same under every arm.
    """

    prompt_id: str
    domain: str
    prompt: torch.Tensor
    request: Request
    seed: int


@dataclass(frozen=True, kw_only=True)
class Served:
    """What became of one request. Moments are seconds from the start of the run.

    Attributes:
        prompt_id: of the prompt.
        domain: of the prompt.
        temperature: it was decoded at.
        arrival: when it came; in a closed loop, when a place for it was free; by captured rounds, its start there.
        start: when the round that let it in began, its prefill included.
        end: when its last token was there.
        emissions: after every round of it, the moment and the number of tokens.
        passes: target passes it took part in after the prefill.
        proposed: by position, rounds that verified it.
        accepted: by position, rounds in which it stood.
        blocks: by block length, rounds.
        digest: of the emitted token ids.
        mismatch: at temperature 0, where it left the target-only output of the same load, or None.
    """

    prompt_id: str
    domain: str
    temperature: float
    arrival: float
    start: float
    end: float
    emissions: list[tuple[float, int]]
    passes: int
    proposed: list[int]
    accepted: list[int]
    blocks: dict[str, int]
    digest: str
    mismatch: Mismatch | None = None

    @property
    def tokens(self) -> int:
        """Tokens emitted."""
        return sum(count for _, count in self.emissions)

    @property
    def seconds_per_token(self) -> float:
        """From the start of its first round to its end, over its tokens."""
        return (self.end - self.start) / self.tokens

    def gaps(self, *, until: float) -> list[float]:
        """Seconds between tokens, one entry a token, up to a moment.

        A round that emits three tokens gives three entries of a third of the time since the round before. The first
        round gives none: its time is the prefill's, and shows in the time to the first token.
        """
        found: list[float] = []
        for (before, _), (moment, count) in zip(self.emissions, self.emissions[1:], strict=False):
            if moment <= until:
                found += [(moment - before) / count] * count
        return found


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One engine's run over a list of requests.

    Attributes:
        window: seconds that count for throughput: of a closed loop those in which every place was taken, from the
            start, so that prefills count and the drain at the end does not; else all of them.
        elapsed: seconds until the last request had ended.
        rounds: steps of the engine.
        pass_seconds: inside the target's passes, those of prefills included; of captured rounds all that the device did
            for rounds and prompts, drafting included.
        draft_seconds: of drafting; next to nothing where nothing drafts, and 0 of captured rounds.
        served: in the order of the list.
    """

    window: float
    elapsed: float
    rounds: int
    pass_seconds: float
    draft_seconds: float
    served: list[Served]

    @property
    def window_tokens(self) -> int:
        """Tokens emitted within the window."""
        return sum(count for one in self.served for moment, count in one.emissions if moment <= self.window)

    @property
    def outside_seconds(self) -> float:
        """Seconds that went neither into the target's passes nor into drafting, waiting for arrivals included."""
        return max(0.0, self.elapsed - self.pass_seconds - self.draft_seconds)


@dataclass(frozen=True, order=True)
class Point:
    """One load.

    Attributes:
        kind: `closed` loop, `poisson` arrivals, or `batch`: all requests at once and none after them.
        concurrency: requests that are kept running, or the most that may run at once.
        share: of a Poisson load, requests a second over those that target-only decoding can serve; else 0.
    """

    kind: str
    concurrency: int
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """One arm on one block of requests: the unit that every figure of a load is computed from.

    Attributes:
        arm: name of the arm.
        point: the load.
        block: index of the block; all arms of a block had the same requests.
        order: position of this arm among the arms of the block, from 0.
        precision: the target's arithmetic.
        trace: what happened.
    """

    arm: str
    point: Point
    block: int
    order: int
    precision: str
    trace: Trace

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> "LoadRun":
        """Rebuild a run from its line."""
        data: dict[str, Any] = json.loads(line)
        trace = data["trace"]
        served = [
            Served(
                **{
                    **one,
                    "emissions": [(moment, count) for moment, count in one["emissions"]],
                    "mismatch": one["mismatch"] and Mismatch(**one["mismatch"]),
                }
            )
            for one in trace["served"]
        ]
        return cls(**{**data, "point": Point(**data["point"]), "trace": Trace(**{**trace, "served": served})})
