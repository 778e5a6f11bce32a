"""Several drafts of one target served at once, to compare them on live traffic, and swapped without a pause.

A request goes to an arm by a hash of its id, so the same id always meets the same draft while the shares stand. Every
arm is a batch engine of its own over the one target; admission is in the order of arrival over all of them, within one
bound on requests and cache. Whatever the arm, a request's tokens are those it would get alone.

An arm that loses to the first one, the control, by more than its margin is turned off: its share goes to the control,
and what runs ends where it runs. That is judged by betting (`inference.betting`), so it may be looked at after every
request: every request of an arm against the latest of the control's that has not met one, so that both are of the same
time and a traffic that moves favours neither. The reward sees tokens a pass and not the seconds that drafting takes.

    engine = ArmEngine(target, [ArmSpec("v1", old, policy, 0.9), ArmSpec("v2", new, policy, 0.1)], max_requests=8)
    handle = engine.submit(prompt, request, request_id="r1", generator=TorchSource.seeded(0))
    while not engine.idle:
        engine.step()
    engine.swap("v2", ArmSpec("v2", newer, policy, 0.1))
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from inference.batch.engine import BatchEngine, Handle, Outcome, QueueFull
from inference.betting import BettingTest, confidence_sequence
from inference.decoder import check_prompt_length
from inference.drafters import Drafter
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.model import CausalModel
from inference.randomness import Source
from inference.request import Request

logger = logging.getLogger(__name__)

# Of the latest requests; more would make every look at the figures slower and their interval hardly narrower.
_KEPT = 2000
# Requests of one side that wait for one of the other; older ones are of another time.
_UNPAIRED = 32


@dataclass(frozen=True)
class ArmSpec:
    """One draft that is served.

    Attributes:
        name: of the arm, such as a pair's version.
        make_drafter: see `BatchEngine`.
        lookahead: policy.
        share: of the requests; shares are taken by their sum.
    """

    name: str
    make_drafter: Callable[[], Drafter]
    lookahead: Lookahead
    share: float


@dataclass(kw_only=True)
class GuardConfig:
    """When an arm is turned off.

    Attributes:
        margin: loss of reward that is put up with; the reward of a request is 1 - passes / tokens, which is 0 without a
            draft and nears 1 as tau grows.
        alpha: chance that an arm no worse than the margin is ever turned off.
    """

    margin: float = 0.05
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.margin < 1 or not 0 < self.alpha < 1:
            raise ValueError(f"guard margin {self.margin} and alpha {self.alpha} must lie between 0 and 1")


@dataclass(frozen=True)
class ArmFigures:
    """What an arm has done.

    Attributes:
        name: of the arm.
        domain: of the requests; "" for all.
        requests: that have ended with tokens, the latest 2,000 at most.
        emitted: tokens.
        passes: target passes.
        reward: mean over requests of 1 - passes / tokens.
        interval: 95 % confidence sequence of that mean: it may be read at any time.
        on: whether it takes new requests.
    """

    name: str
    domain: str
    requests: int
    emitted: int
    passes: int
    reward: float
    interval: tuple[float, float]
    on: bool

    @property
    def tau(self) -> float:
        """Tokens per target pass."""
        return self.emitted / self.passes if self.passes else 1.0


class _Pairs:
    """Rewards of an arm and of the control, paired as they come: each with the latest of the other side that waits."""

    def __init__(self) -> None:
        self._mine: deque[float] = deque(maxlen=_UNPAIRED)
        self._control: deque[float] = deque(maxlen=_UNPAIRED)

    def mine(self, reward: float) -> float | None:
        """Take in one of the arm's; returns its reward less the control's where one waited."""
        if self._control:
            return reward - self._control.pop()
        self._mine.append(reward)
        return None

    def control(self, reward: float) -> float | None:
        """Take in one of the control's; returns the arm's less its reward where one waited."""
        if self._mine:
            return self._mine.pop() - reward
        self._control.append(reward)
        return None


@dataclass
class _Arm:
    """An arm's engines (the present one last; earlier ones drain) and what its requests have given."""

    spec: ArmSpec
    engines: list[BatchEngine]
    on: bool = True
    given: deque[Handle] = field(default_factory=deque)
    domains: deque[str] = field(default_factory=deque)
    pairs: _Pairs = field(default_factory=lambda: _Pairs())
    test: BettingTest | None = None
    rewards: deque[tuple[str, float, int, int]] = field(default_factory=lambda: deque(maxlen=_KEPT))


@dataclass(frozen=True)
class _Waiting:
    """A request that no engine has yet, and the engine that will take it."""

    handle: Handle
    engine: BatchEngine


class ArmEngine:
    """See the module.

    Args:
        target: the model whose law every output follows.
        arms: the control first.
        max_requests: most requests at once, over all arms.
        max_cache_tokens: cache positions of all arms together; None for what `max_requests` of the whole context need.
        max_waiting: most requests that wait; None for any number.
        guard: when an arm is turned off; None for never.
        salt: of the hash; another one deals the ids anew.
        clock: seconds, for deadlines.

    Raises:
        ValueError: no arm, equal names, or shares that are none.
    """

    def __init__(
        self,
        target: CausalModel,
        arms: Sequence[ArmSpec],
        *,
        max_requests: int,
        max_cache_tokens: int | None = None,
        max_waiting: int | None = None,
        guard: GuardConfig | None = None,
        salt: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = [spec.name for spec in arms]
        if not arms or len(set(names)) < len(names):
            raise ValueError(f"arms are {names}; give at least one, each with a name of its own")
        if min(spec.share for spec in arms) < 0 or not sum(spec.share for spec in arms) > 0:
            raise ValueError("shares of arms must not be negative, nor all of them 0")
        self.target, self.max_requests, self.max_waiting = target, max_requests, max_waiting
        self._guard, self._salt, self._clock = guard, salt, clock
        self._max_cache = max_cache_tokens
        self._arms = {spec.name: _Arm(spec, [self._engine(spec)]) for spec in arms}
        self._control = names[0]
        self.max_cache_tokens = self._bound()
        self._queue: deque[_Waiting] = deque()
        self._taken_by: dict[int, tuple[Handle, BatchEngine]] = {}  # of requests that have not ended
        for name in names[1:]:
            self._arms[name].test = self._new_test()

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._queue and all(engine.idle for engine in self._engines())

    @property
    def num_running(self) -> int:
        """Requests in slots, over all arms."""
        return sum(engine.num_running for engine in self._engines())

    @property
    def cache_tokens(self) -> int:
        """Positions that running requests of all arms may come to need; never above `max_cache_tokens`."""
        return sum(engine.cache_tokens for engine in self._engines())

    def arm_of(self, request_id: str) -> str:
        """The arm that a request of this id goes to now."""
        digest = hashlib.sha256(f"{self._salt}/{request_id}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64 * sum(arm.spec.share for arm in self._arms.values())
        chosen = self._control
        for name, arm in self._arms.items():
            if position < arm.spec.share:
                chosen = name
                break
            position -= arm.spec.share
        return chosen if self._arms[chosen].on else self._control

    def submit(
        self,
        prompt: torch.Tensor,
        request: Request,
        *,
        request_id: str,
        generator: Source,
        domain: str = "",
        deadline: float | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Handle:
        """Take a request into the arm of its id; arguments and errors are those of `BatchEngine.submit`."""
        arm = self._arms[self.arm_of(request_id)]
        handle = Handle(prompt, request, generator, deadline, on_tokens)
        check_prompt_length(prompt.shape[0], self.target.context_limit)
        engine = arm.engines[-1]
        alone = engine.room(handle)
        if alone > self.max_cache_tokens:
            raise InputError(
                f"the request needs {alone} cache positions, there are {self.max_cache_tokens}",
                where="prompt",
                mend="shorten it, ask for fewer tokens, or raise max_cache_tokens",
            )
        if self.max_waiting is not None and len(self._queue) >= self.max_waiting:
            raise QueueFull(f"{len(self._queue)} requests are waiting")
        self._queue.append(_Waiting(handle, engine))
        self._taken_by[id(handle)] = (handle, engine)
        arm.given.append(handle)
        arm.domains.append(domain)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Give a request up; what it has emitted stays. Nothing happens to one that has ended."""
        for waiting in list(self._queue):
            if waiting.handle is handle:
                self._queue.remove(waiting)
                handle.outcome = Outcome.CANCELLED
        if not handle.ended:
            self._taken_by[id(handle)][1].cancel(handle)

    def step(self) -> None:
        """Let waiting requests in, in the order of arrival, then one round of every arm that has any."""
        now = self._clock()
        for waiting in list(self._queue):
            if waiting.handle.deadline is not None and now > waiting.handle.deadline:
                self._queue.remove(waiting)
                waiting.handle.outcome = Outcome.LATE
        while self._queue and self._fits(self._queue[0]):
            waiting = self._queue.popleft()
            waiting.engine.take(waiting.handle)
        for engine in list(self._engines()):
            if not engine.idle:
                engine.step()
        for arm in self._arms.values():
            self._drain(arm)
            self._collect(arm)
        ended = [key for key, (handle, _) in self._taken_by.items() if handle.ended]
        for key in ended:
            del self._taken_by[key]

    def swap(self, name: str, spec: ArmSpec) -> None:
        """Serve another draft under an arm's name from now on; requests taken before keep theirs to their end.

        Figures and the guard's evidence begin anew: they are of the draft, not of the name.

        Raises:
            KeyError: no such arm.
            ValueError: the specification has another name.
        """
        if spec.name != name:
            raise ValueError(f"the specification is of arm {spec.name!r}, not {name!r}")
        old = self._arms[name]
        arm = self._arms[name] = _Arm(spec, [*old.engines, self._engine(spec)])
        # What the old draft's requests still give is nobody's: they belong to neither side of a comparison.
        control = self._arms[self._control]
        for other in self._arms.values():
            if other is not control and (other is arm or arm is control):
                other.test, other.pairs = self._new_test(), _Pairs()
        self.max_cache_tokens = self._bound()
        self._drain(arm)

    def figures(self) -> list[ArmFigures]:
        """Figures of every arm, over all requests and by domain."""
        found = []
        for arm in self._arms.values():
            for domain in ["", *sorted({reward[0] for reward in arm.rewards} - {""})]:
                mine = [reward for reward in arm.rewards if domain in ("", reward[0])]
                values = np.array([value for _, value, _, _ in mine])
                low, high = confidence_sequence(values, low=0.0, high=1.0, alpha=0.05)
                mean = float(values.mean()) if len(values) else 0.0
                emitted, passes = sum(r[2] for r in mine), sum(r[3] for r in mine)
                found.append(ArmFigures(arm.spec.name, domain, len(mine), emitted, passes, mean, (low, high), arm.on))
        return found

    def _engine(self, spec: ArmSpec) -> BatchEngine:
        return BatchEngine(
            self.target,
            spec.make_drafter,
            spec.lookahead,
            max_requests=self.max_requests,
            max_cache_tokens=self._max_cache,
            clock=self._clock,
        )

    def _bound(self) -> int:
        """Cache positions of all arms together: as configured, else what the arm with the longest blocks would have."""
        return max(engine.max_cache_tokens for engine in self._engines())

    def _engines(self) -> list[BatchEngine]:
        return [engine for arm in self._arms.values() for engine in arm.engines]

    def _new_test(self) -> BettingTest | None:
        if self._guard is None:
            return None
        return BettingTest(null_mean=-self._guard.margin, low=-1.0, high=1.0, alternative="less")

    def _fits(self, waiting: _Waiting) -> bool:
        """Whether a request can join now, within the bounds over all arms."""
        engines = self._engines()
        if sum(engine.num_held for engine in engines) >= self.max_requests:
            return False
        others = sum(engine.cache_tokens_with() for engine in engines if engine is not waiting.engine)
        return others + waiting.engine.cache_tokens_with(waiting.handle) <= self.max_cache_tokens

    def _drain(self, arm: _Arm) -> None:
        """Free the engines of drafts that were swapped out, once nobody needs them."""
        wanted = {id(waiting.engine) for waiting in self._queue}
        arm.engines = [
            engine for engine in arm.engines if engine is arm.engines[-1] or not engine.idle or id(engine) in wanted
        ]

    def _collect(self, arm: _Arm) -> None:
        """Rewards of requests that have ended, in the order of arrival; a running one holds up those after it."""
        while arm.given and arm.given[0].ended:
            handle, domain = arm.given.popleft(), arm.domains.popleft()
            emitted, passes = len(handle.result.tokens), handle.result.passes
            if not emitted:
                continue
            reward = min(1.0, max(0.0, 1.0 - passes / emitted))
            arm.rewards.append((domain, reward, emitted, passes))
            self._judge(arm, reward)

    def _judge(self, arm: _Arm, reward: float) -> None:
        """Bet on a request's reward against one of the other side."""
        if self._guard is None:
            return
        if arm is self._arms[self._control]:
            for other in self._arms.values():
                if other.test is not None:
                    self._bet(other, other.pairs.control(reward))
        elif arm.test is not None:
            self._bet(arm, arm.pairs.mine(reward))

    def _bet(self, arm: _Arm, difference: float | None) -> None:
        if difference is None or arm.test is None or self._guard is None:
            return
        arm.test.update(difference)
        if arm.on and arm.test.rejected(self._guard.alpha):
            arm.on = False
            logger.warning(
                "arm %s is turned off: it loses to %s by more than %g (p <= %.2g)",
                arm.spec.name,
                self._control,
                self._guard.margin,
                arm.test.p_value,
            )
