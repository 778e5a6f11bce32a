"""Counters of vLLM and SGLang as records of a traffic log. Reads no file and asks no server.

vLLM and SGLang tell of speculation in Prometheus metrics: totals since the server started, not requests. Each record is
the difference of two scrapes, one interval. Definitions are brought to ours where the counters allow it:

- vLLM with counters by position: position k was verified in as many drafts as accepted position k - 1. Exact where
  every draft has full length, else the later positions count as verified too often and the rate comes out too low.
- Otherwise (SGLang; vLLM without positions) one position stands for all, and its `proposed` are the drafted tokens, not
  the verified ones: that rate is lower than ours and compares only with others of its source.
- Every token that no draft gave was a pass's own, so passes = emitted - accepted; the prefill counts as the pass of
  a request's first token.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from inference.errors import InputError
from inference.traffic import TrafficRecord
from pipelines.traffic_scrapes import Interval, Scrape

logger = logging.getLogger(__name__)

UNKNOWN_TEMPERATURE = -1.0
_DRAFTS = "vllm:spec_decode_num_drafts"
_DRAFTED = "vllm:spec_decode_num_draft_tokens"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
_LENGTH = "sglang:spec_accept_length"
_RATE = "sglang:spec_accept_rate"
_CALLS = "sglang:spec_verify_calls"


@dataclass(frozen=True)
class Counted:
    """What an interval gave, in the terms of `TrafficRecord`."""

    requests: int
    emitted: int
    passes: int
    proposed: list[int]
    accepted: list[int]


def vllm_counted(interval: Interval) -> Counted:
    """vLLM's counters.

    Raises:
        InputError: the server does not speculate.
    """
    drafts, drafted, accepted = (interval.grown(name) for name in (_DRAFTS, _DRAFTED, _ACCEPTED))
    if drafts is None or drafted is None or accepted is None:
        raise _not_speculating("vllm", interval.after, mend="start the server with --speculative-config")
    generated = interval.grown("vllm:generation_tokens")
    emitted = drafts + accepted if generated is None else generated
    # Tokens accepted behind a stop token are counted as accepted and never emitted: no fewer passes than drafts.
    passes = max(drafts, emitted - accepted)
    positions = interval.grown_by(_BY_POSITION, label="position")
    proposed = [drafts, *positions[:-1]] if positions else [drafted]
    return Counted(
        interval.grown("vllm:request_success") or 0,
        emitted,
        passes,
        proposed if drafts else [],
        (positions or [accepted]) if drafts else [],
    )


def sglang_counted(interval: Interval) -> Counted:
    """SGLang's counters and gauges. Gauges are of the moment before the later scrape and are taken for the interval.

    Verifications are counted by newer servers and otherwise reckoned from tokens and the mean length.

    Raises:
        InputError: the server does not speculate.
    """
    length, rate = interval.after.mean(_LENGTH), interval.after.mean(_RATE)
    generated, calls = interval.grown("sglang:generation_tokens"), interval.grown(_CALLS)
    if generated is None or (length is None and calls is None):
        mend = "start the server with --enable-metrics and a --speculative-algorithm"
        raise _not_speculating("sglang", interval.after, mend=mend)
    requests = interval.grown("sglang:num_requests") or 0
    decoded = max(0, generated - requests)  # a request's first token comes from its prefill
    if calls is None:
        calls = round(decoded / length) if length and length >= 1.0 else 0  # the gauge is 0 before the first batch
    accepted = max(0, decoded - calls) if calls else 0
    # Nothing accepted: the rate of 0 tells not how many were drafted, but each verification had one at least.
    drafted = max(accepted, round(accepted / rate)) if rate and accepted else calls
    # Without the gauge of the rate the drafted tokens are not known, and accepted ones alone make no rate.
    known = calls > 0 and (rate is not None or not accepted)
    return Counted(
        requests,
        generated,
        max(0, generated - accepted),
        [drafted] if known and drafted >= accepted else [],
        [accepted] if known and drafted >= accepted else [],
    )


def _not_speculating(engine: str, scrape: Scrape, *, mend: str) -> InputError:
    return InputError(f"no metrics of {engine} on speculative decoding", where=scrape.where, mend=mend)


ENGINES: dict[str, tuple[Callable[[Interval], Counted], tuple[str, ...]]] = {
    "vllm": (
        vllm_counted,
        (_DRAFTS, _DRAFTED, _ACCEPTED, _BY_POSITION, "vllm:generation_tokens", "vllm:request_success"),
    ),
    "sglang": (sglang_counted, (_CALLS, "sglang:generation_tokens", "sglang:num_requests")),
}
"""How an engine is read, and the counters that show its restarts."""


def records_of(
    scrapes: list[Scrape],
    *,
    engine: str,
    pair: str,
    target: str,
    arm: str = "",
    domain: str = "",
    temperature: float = UNKNOWN_TEMPERATURE,
) -> list[TrafficRecord]:
    """One record for every interval in which something was decoded.

    Args:
        scrapes: of one server, oldest first.
        engine: a key of `ENGINES`.
        pair: name and version that was served.
        target: digest of its target.
        arm: that served; "" is the engine's name.
        domain: of the requests, or "".
        temperature: of the requests, -1 where unknown or mixed.

    Raises:
        InputError: fewer than two scrapes, out of order, or of a server that does not speculate.
    """
    if len(scrapes) < 2:
        raise InputError(f"{len(scrapes)} scrape(s) make no interval", where="--from", mend="give it twice or more")
    count, counters = ENGINES[engine]
    records = []
    for before, after in pairwise(scrapes):
        if after.at < before.at:
            raise InputError(
                f"{after.where} is older than {before.where}", where="--from", mend="give the scrapes oldest first"
            )
        interval = Interval.between(before, after, counters=counters)
        counted = count(interval)
        if not counted.emitted and not sum(counted.proposed):
            logger.info("nothing was decoded between %s and %s", before.where, after.where)
            continue
        name = hashlib.sha256(f"{engine}/{before.digest}/{after.digest}".encode()).hexdigest()
        records.append(
            TrafficRecord(
                id=f"{engine}-{name[:32]}",
                time=after.at,
                pair=pair,
                target=target,
                arm=arm or engine,
                domain=domain,
                temperature=temperature,
                prompt=None,
                prompt_digest="",
                response=None,
                response_digest="",
                emitted=counted.emitted,
                passes=counted.passes,
                proposed=counted.proposed,
                accepted=counted.accepted,
                seconds=round(after.at - before.at, 6),
                source=engine,
                requests=counted.requests,
            )
        )
    return records


__all__ = ["ENGINES", "UNKNOWN_TEMPERATURE", "Counted", "records_of", "sglang_counted", "vllm_counted"]
