"""What captured rounds take: replays of a round, whole and by part, and the costs of a draft that follow from them.

On a CPU the same rounds are timed uncaptured.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from inference.costs import RoundCosts
from inference.graphed.rounds import Rounds

_BURSTS, _IN_A_ROW = 5, 10
# Launches cost nothing to speak of there, and rounds take ten times as long.
_IN_A_ROW_ON_CPU = 2


@dataclass(frozen=True)
class RoundSeconds:
    """One round.

    Attributes:
        whole: all of it.
        draft: proposing the block, captured apart; 0 without a draft.
        verify: the target's pass, captured apart; the whole round without a draft.
    """

    whole: float
    draft: float
    verify: float


class Moment:
    """When the device comes to this point of what it was asked for; without a GPU that is now.

    Args:
        on_gpu: whether there is one.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._seconds = 0.0 if on_gpu else time.perf_counter()
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: "Moment") -> float:
        """Seconds of the device from another moment; both have come."""
        if self._event is None or other._event is None:
            return self._seconds - other._seconds
        return 1e-3 * float(other._event.elapsed_time(self._event))


@torch.inference_mode()
def round_seconds(rounds: Rounds, *, length: int, sampled: bool, by_part: bool = True) -> RoundSeconds:
    """Time rounds after a context of a given length; requests under way are lost.

    Args:
        rounds: of any number of requests.
        length: tokens before the anchor.
        sampled: at a temperature; rounds propose the tree where there is one for such rounds.
        by_part: also capture and time the parts; without it, and without a draft, all counts as verifying.
    """
    device = rounds.anchors.device
    whole = replay_seconds(steady_round(rounds, length=length, sampled=sampled), device)
    if not by_part or not rounds.width:
        return RoundSeconds(whole, 0.0, whole)
    parts = rounds.parts(shown=rounds.shown(length, sampled=sampled), sampled=sampled)
    return RoundSeconds(whole, **{name: replay_seconds(part, device) for name, part in parts.items()})


def steady_round(rounds: Rounds, *, length: int, sampled: bool) -> Callable[[], None]:
    """A round that finds the same context however often it runs."""
    shown = rounds.shown(length, sampled=sampled)

    def work() -> None:
        rounds.lengths.fill_(length)
        if rounds.context is not None:
            rounds.context.held.fill_(length)
        rounds.round(shown=shown, sampled=sampled)

    return work


@torch.inference_mode()
def replay_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Lower quartile of the seconds of one replay, several in a row at a time; the first is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _no_wait
    count = _IN_A_ROW if device.type == "cuda" else _IN_A_ROW_ON_CPU
    work()
    seconds = []
    for _ in range(_BURSTS):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        seconds.append((time.perf_counter() - began) / count)
    return statistics.quantiles(seconds, n=4)[0]


def _no_wait() -> None:
    """A CPU has done what it was asked for."""


def costs_of(timed: Mapping[int, RoundSeconds]) -> RoundCosts:
    """Costs by which a round of every timed length takes what it took whole.

    Drafting is the line through the shortest and the longest block; all else of a round counts as the target's pass.

    Args:
        timed: rounds by tokens proposed, target-only ones (0) among them.
    """
    lengths = sorted(length for length in timed if length)
    passes = {1: timed[0].whole}
    if not lengths:
        return RoundCosts(passes)
    shortest, longest = lengths[0], lengths[-1]
    rise = timed[longest].draft - timed[shortest].draft
    token = max(0.0, rise / (longest - shortest)) if longest > shortest else 0.0
    block = max(0.0, timed[shortest].draft - shortest * token)
    drafting = RoundCosts({1: 0.0}, block, token)
    passes |= {1 + length: max(0.0, timed[length].whole - drafting.seconds(length)) for length in lengths}
    return RoundCosts(passes, block, token)
