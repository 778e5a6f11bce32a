"""What a server is told: which pair, where it listens, and the limits that keep one client from taking it all."""

import math
from dataclasses import dataclass
from pathlib import Path

from inference.pair_files import DEFAULT_CACHE
from inference.traffic import TrafficConfig


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What is served.

    Attributes:
        folder: a version folder, or an alias such as `champion`, which is followed when it moves.
        target: the target's folder or id here; None takes the pair's own.
        device: `auto`, `cpu` or `cuda`.
        cache: where converted models are kept.
        other_target: take a target whose weights are not those the pair was made for.
        lookahead: tokens proposed a round, always; 0 decodes with the target alone; None goes by the pair's own policy.
        load_costs: `load_costs.json` of `dspark load` on this machine; with it a `scheduled` policy decides for all
            requests of a pass together. None lets each request decide for itself.
        max_requests: most requests decoded at once.
        max_cache_tokens: positions that running requests may come to need; None for what the slots need at most.
    """

    folder: Path
    target: str | None = None
    device: str = "auto"
    cache: Path = DEFAULT_CACHE
    other_target: bool = False
    lookahead: int | None = None
    load_costs: Path | None = None
    max_requests: int = 8
    max_cache_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_requests < 1:
            raise ValueError(f"max_requests is {self.max_requests}; use at least 1")
        if self.lookahead is not None and self.lookahead < 0:
            raise ValueError(f"lookahead is {self.lookahead}; use 0 for the target alone, or a number of tokens")
        if self.max_cache_tokens is not None and self.max_cache_tokens < 1:
            raise ValueError(f"max_cache_tokens is {self.max_cache_tokens}; use at least 1")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may take.

    Attributes:
        max_waiting: requests that may wait for a slot; more are refused with status 429.
        max_tokens: longest answer, in tokens; also its length where a chat does not say one.
        max_prompt_tokens: longest prompt; 0 for what the target's context holds.
        max_body_bytes: largest request body; larger ones are refused with status 413.
        body_s: seconds a client may take to send its body.
        timeout_s: seconds a request may take, waiting included.
        slow_reader_s: seconds a client may leave what was sent to it unread before its request is cancelled.
        drain_s: seconds that running requests are given after SIGTERM or ctrl-c.
        watch_s: seconds between looks at the pair's alias; 0 for never.
    """

    max_waiting: int = 64
    max_tokens: int = 1024
    max_prompt_tokens: int = 0
    max_body_bytes: int = 1 << 20
    body_s: float = 30.0
    timeout_s: float = 300.0
    slow_reader_s: float = 20.0
    drain_s: float = 30.0
    watch_s: float = 5.0

    def __post_init__(self) -> None:
        if min(self.max_waiting, self.max_prompt_tokens, self.drain_s, self.watch_s) < 0:
            raise ValueError("max_waiting, max_prompt_tokens, drain_s and watch_s are 0 or more")
        if self.max_tokens < 1 or self.max_body_bytes < 1:
            raise ValueError("max_tokens and max_body_bytes are at least 1")
        seconds = (self.body_s, self.timeout_s, self.slow_reader_s)
        if min(seconds) <= 0 or not all(map(math.isfinite, (*seconds, self.drain_s, self.watch_s))):
            raise ValueError("body_s, timeout_s and slow_reader_s are above 0, and all times are finite")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A whole server.

    Attributes:
        pair: what is served.
        limits: what requests may take.
        host: address to listen on.
        port: to listen on; 0 for any that is free.
        token: that clients must show; empty for none. Never logged.
        open_metrics: whether `/metrics` is answered without the token.
        model_name: name that clients ask for; empty for the pair's own.
        traffic: folder of the log of requests; None for none.
        traffic_config: how much of them is kept there.
    """

    pair: PairSettings
    limits: Limits = Limits()
    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    open_metrics: bool = False
    model_name: str = ""
    traffic: Path | None = None
    traffic_config: TrafficConfig | None = None

    def __repr__(self) -> str:
        """Without the token."""
        return f"ServerSettings(pair={self.pair.folder}, host={self.host!r}, port={self.port})"
