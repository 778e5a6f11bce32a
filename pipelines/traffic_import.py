"""`dspark traffic`: bring the counters of a serving engine into a traffic log, and show what a log holds.

    dspark traffic import --engine vllm --from before.txt --from after.txt --log traffic --pair smollm2/v3 ...
    dspark traffic show --log traffic

vLLM and SGLang tell of speculation in Prometheus metrics: totals since the server started, not requests. Each record is
the difference of two scrapes, one interval. Definitions are brought to ours where the counters allow it:

- vLLM with counters by position: position k was verified in as many drafts as accepted position k - 1. Exact where
  every draft has full length, else the later positions count as verified too often and the rate comes out too low.
- Otherwise (SGLang; vLLM without positions) one position stands for all, and its `proposed` are the drafted tokens, not
  the verified ones: that rate is lower than ours and compares only with others of its source.
- Every token that no draft gave was a pass's own, so passes = emitted - accepted; the prefill counts as the pass of
  a request's first token.
"""

import argparse
import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from inference.errors import InputError, first_line
from inference.traffic import Traffic, TrafficConfig, TrafficLog, TrafficRecord, read_traffic

logger = logging.getLogger(__name__)

UNKNOWN_TEMPERATURE = -1.0
_START = "process_start_time_seconds"
_DRAFTS = "vllm:spec_decode_num_drafts"
_DRAFTED = "vllm:spec_decode_num_draft_tokens"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
_LENGTH = "sglang:spec_accept_length"
_RATE = "sglang:spec_accept_rate"
_CALLS = "sglang:spec_verify_calls"

Series = tuple[tuple[str, str], ...]
"""Labels of one series, sorted."""


@dataclass(frozen=True)
class Scrape:
    """What one scrape says.

    Attributes:
        where: file or URL it came from.
        at: seconds since 1970.
        values: by metric, its name without `_total`, and series.
        digest: sha256 of its text.
    """

    where: str
    at: float
    values: Mapping[str, Mapping[Series, float]]
    digest: str

    def total(self, metric: str) -> float | None:
        """Sum over all series, None where there is none."""
        return sum(self.values[metric].values()) if metric in self.values else None

    def mean(self, metric: str) -> float | None:
        """Mean over all series, None where there is none."""
        total = self.total(metric)
        return None if total is None else total / len(self.values[metric])


def parse_scrape(text: str, *, where: str, at: float, model: str | None = None) -> Scrape:
    """Read Prometheus text.

    Args:
        text: as a `/metrics` address answers it.
        where: it came from.
        at: seconds since 1970.
        model: keep only series whose `model_name` is this one; None takes the only one there is.

    Raises:
        InputError: it is no such text, tells of several models or not of this one, or the library is missing.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise InputError(
            "reading metrics needs prometheus_client", where=where, mend="install it: pip install prometheus_client"
        ) from None
    found: dict[str, dict[Series, float]] = defaultdict(dict)
    named: dict[str, dict[Series, float]] = defaultdict(dict)
    models: set[str] = set()
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"this is no Prometheus text ({first_line(error)})", where=where, mend="save what /metrics answers"
        ) from None
    for sample in samples:
        if not math.isfinite(sample.value):
            continue
        name = sample.labels.get("model_name")
        if name is not None and sample.name.startswith(("vllm:", "sglang:")):
            models.add(name)
            if model is not None and name != model:
                continue
        # Some exporters write a counter under both names: the one with the suffix counts.
        place = named if sample.name.endswith("_total") else found
        place[sample.name.removesuffix("_total")][tuple(sorted(sample.labels.items()))] = float(sample.value)
    if model is None and len(models) > 1:
        raise InputError(f"metrics of several models: {', '.join(sorted(models))}", where=where, mend="give --model")
    if model is not None and model not in models:
        raise InputError(f"no metrics of model {model!r}", where=where, mend=f"it has {', '.join(sorted(models))}")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Scrape(where, at, {**found, **named}, digest)


def read_scrape(source: str, *, model: str | None = None) -> Scrape:
    """Read a file, as of when it was last changed, or an http address, as of now.

    Args:
        source: path, or URL; one without a path means its `/metrics`.
        model: see `parse_scrape`.

    Raises:
        InputError: it cannot be read or does not answer; see `parse_scrape` too.
    """
    if source.startswith(("http://", "https://")):
        return parse_scrape(_fetched(source), where=source, at=time.time(), model=model)
    path = Path(source).expanduser()
    try:
        return parse_scrape(path.read_text(encoding="utf-8"), where=source, at=path.stat().st_mtime, model=model)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read the scrape ({reason})", where=source, mend="check the path") from None


def _fetched(url: str) -> str:
    import httpx

    try:
        address = httpx.URL(url)
        if address.path in ("", "/"):
            address = address.copy_with(path="/metrics")
        answer = httpx.get(address, timeout=10.0, follow_redirects=True)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"the server gave no metrics ({first_line(error)})",
            where=url,
            mend="check the address; SGLang needs --enable-metrics",
        ) from None
    return answer.text


@dataclass(frozen=True)
class Interval:
    """Two scrapes of one server, one after the other.

    Attributes:
        before: the earlier one.
        after: the later one.
        restarted: whether the server began anew between them, so that the later one's totals are all there is.
    """

    before: Scrape
    after: Scrape
    restarted: bool

    @classmethod
    def between(cls, before: Scrape, after: Scrape, *, counters: Iterable[str]) -> "Interval":
        """Compare counters: one that fell, or was there and is gone, shows a restart, as does another start time."""
        fell = any(
            after.values.get(name, {}).get(series, 0.0) < value
            for name in counters
            for series, value in before.values.get(name, {}).items()
        )
        starts = before.total(_START), after.total(_START)
        # A gap of a second: start times are reckoned from ticks since boot and may be rounded otherwise.
        moved = None not in starts and abs((starts[1] or 0.0) - (starts[0] or 0.0)) > 1.0
        if fell or moved:
            logger.warning(
                "the server was restarted between %s and %s: only what it counted since then is taken",
                before.where,
                after.where,
            )
        return cls(before, after, fell or moved)

    def grown(self, metric: str) -> int | None:
        """By how much a counter grew, None where the later scrape does not have it."""
        end = self.after.total(metric)
        if end is None:
            return None
        return round(end - (0.0 if self.restarted else self.before.total(metric) or 0.0))

    def grown_by(self, metric: str, *, label: str) -> list[int]:
        """Likewise by the values of a label that are 0, 1, ...; empty where there is none."""
        ends: dict[int, float] = defaultdict(float)
        for scrape, sign in ((self.after, 1.0), (self.before, 0.0 if self.restarted else -1.0)):
            for series, value in scrape.values.get(metric, {}).items():
                position = dict(series).get(label, "")
                if position.isdecimal():
                    ends[int(position)] += sign * value
        return [round(ends[position]) for position in range(max(ends, default=-1) + 1)]


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


def main(argv: list[str]) -> int:
    """Run `dspark traffic import` or `dspark traffic show`.

    Raises:
        InputError: a scrape or the log cannot be used; the command line prints it.
    """
    parser = argparse.ArgumentParser(prog="dspark traffic", description="Logs of served requests.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="what a log holds")
    show.add_argument("--log", required=True, type=Path, help="folder of the log")
    bring = verbs.add_parser("import", help="bring in metrics of vLLM or SGLang")
    bring.add_argument("--engine", required=True, choices=sorted(ENGINES), help="that serves")
    bring.add_argument(
        "--from", required=True, action="append", dest="sources", help="a saved scrape or http address, oldest first"
    )
    bring.add_argument("--every", type=float, default=60.0, help="seconds to wait between addresses (default: 60)")
    bring.add_argument("--model", default=None, help="model_name, where the server has several")
    bring.add_argument("--log", required=True, type=Path, help="folder of the log")
    bring.add_argument("--pair", required=True, help="that is served, as in smollm2-135m/v3")
    bring.add_argument("--target-digest", required=True, help="digest of the pair's target")
    bring.add_argument("--arm", default="", help="that serves (default: the engine's name)")
    bring.add_argument("--domain", default="", help="of the requests (default: unknown)")
    bring.add_argument(
        "--temperature", type=float, default=UNKNOWN_TEMPERATURE, help="of the requests (default: -1, unknown)"
    )
    words = parser.parse_args(argv)
    if words.verb == "show":
        _show(words.log.expanduser())
    else:
        _import(words)
    return 0


def _import(words: argparse.Namespace) -> None:
    if not (math.isfinite(words.every) and words.every >= 0):
        raise InputError(f"cannot wait {words.every} seconds", where="--every", mend="give 0 or more")
    scrapes: list[Scrape] = []
    for source in words.sources:
        if scrapes and source.startswith("http"):
            time.sleep(words.every)
        scrapes.append(read_scrape(source, model=words.model))
    records = records_of(
        scrapes,
        engine=words.engine,
        pair=words.pair,
        target=words.target_digest,
        arm=words.arm,
        domain=words.domain,
        temperature=words.temperature,
    )
    folder = words.log.expanduser()
    log = TrafficLog(folder, config=TrafficConfig())
    known = {record.id for record in read_traffic(folder).records}
    fresh = [record for record in records if record.id not in known]
    for record in fresh:
        log.append(record)
    if log.lost:
        raise InputError(f"{log.lost} records could not be written", where=str(folder), mend="free some space")
    logger.info("%d intervals imported, %d were there already", len(fresh), len(records) - len(fresh))


def summary(traffic: Traffic) -> list[tuple[str, ...]]:
    """Rows of the table: by pair, domain, temperature and source, with what is summed over their records."""
    groups: dict[tuple[str, str, float, str], list[TrafficRecord]] = defaultdict(list)
    for record in traffic.records:
        groups[record.pair, record.domain, record.temperature, record.source].append(record)
    rows: list[tuple[str, ...]] = []
    for (pair, domain, temperature, source), records in sorted(groups.items()):
        whole = _summed(records)
        rows.append(
            (
                pair,
                domain or "unknown",
                "unknown" if temperature < 0 else f"{temperature:g}",
                source,
                str(whole.requests),
                str(whole.emitted),
                "-" if whole.rate is None else f"{whole.rate:.3f}",
                "-" if whole.tau is None else f"{whole.tau:.2f}",
            )
        )
    return rows


def _summed(records: list[TrafficRecord]) -> TrafficRecord:
    """One record that stands for many; positions are summed into one."""
    return replace(
        records[0],
        requests=sum(record.requests for record in records),
        emitted=sum(record.emitted for record in records),
        passes=sum(record.passes for record in records),
        proposed=[sum(sum(record.proposed) for record in records)],
        accepted=[sum(sum(record.accepted) for record in records)],
    )


def _show(folder: Path) -> None:
    """The table, on stderr like all progress."""
    from rich.console import Console
    from rich.table import Table

    traffic = read_traffic(folder)
    title = (
        f"{folder}: {len(traffic.records)} records in {traffic.segments} segments, {traffic.nbytes / 1e6:.1f} MB; "
        f"{traffic.torn} torn lines, {traffic.newer} of a newer version, {traffic.dropped} records dropped"
    )
    names = ("pair", "domain", "temperature", "source", "requests", "tokens", "acceptance", "tau")
    table = Table(*names, title=title)
    for row in summary(traffic):
        table.add_row(*row)
    Console(stderr=True).print(table)
