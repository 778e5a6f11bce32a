"""Prometheus text of a serving engine: one scrape, and what grew between two. Knows no engine and no speculation."""

import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inference.errors import InputError, first_line

logger = logging.getLogger(__name__)

_START = "process_start_time_seconds"

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


__all__ = ["Interval", "Scrape", "Series", "parse_scrape", "read_scrape"]
