"""Whether the mix of domains has moved from what it was when the log of this pair began.

The first `LEARN` requests give the shares. After them two forecasters bet on every request's domain: one that knows the
requests since then alone, against one that pools them with the first. Both are Dirichlet forecasts (half a request of
every domain added), so that shares learnt from few requests are not taken for exact: under one mix for all neither
gains on the other, on average over such mixes. The evidence begins again wherever it falls below 1. How rare false
alarms are is measured (docs/drift.md) and not proved.
"""

import math
from collections import Counter
from typing import Any

LEARN = 200
_PRIOR = 0.5
# Recent requests below which the index is noise; it is 0 then.
_FEWEST = 50


class MixDetector:
    """Detector of one pair's traffic.

    Attributes:
        learnt: requests by domain while the shares are learnt.
        recent: requests by domain since the present evidence began.
        evidence: against the learnt shares.
    """

    def __init__(self) -> None:
        self.learnt: Counter[str] = Counter()
        self.recent: Counter[str] = Counter()
        self.evidence = 1.0

    def update(self, domain: str) -> None:
        """Take in one request."""
        if self.learnt.total() < LEARN:
            self.learnt[domain] += 1
            return
        if self.evidence < 1.0:
            self.evidence, self.recent = 1.0, Counter()
        domains = {*self.learnt, *self.recent, domain}
        both = self.learnt.total() + self.recent.total()
        expected = (self.learnt[domain] + self.recent[domain] + _PRIOR) / (both + _PRIOR * len(domains))
        seen = (self.recent[domain] + _PRIOR) / (self.recent.total() + _PRIOR * len(domains))
        self.evidence *= seen / expected
        self.recent[domain] += 1

    def psi(self) -> float:
        """Population stability index of recent against learnt shares; below 0.1 is usually called stable."""
        if self.recent.total() < _FEWEST:
            return 0.0
        domains = {*self.learnt, *self.recent}
        total = 0.0
        for domain in domains:
            now = (self.recent[domain] + _PRIOR) / (self.recent.total() + _PRIOR * len(domains))
            then = (self.learnt[domain] + _PRIOR) / (self.learnt.total() + _PRIOR * len(domains))
            total += (now - then) * math.log(now / then)
        return total

    def to_json(self) -> dict[str, Any]:
        """Everything needed to go on exactly."""
        return {"learnt": dict(self.learnt), "recent": dict(self.recent), "evidence": self.evidence}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "MixDetector":
        """Go on from `to_json`."""
        detector = cls()
        detector.learnt, detector.recent = Counter(data["learnt"]), Counter(data["recent"])
        detector.evidence = float(data["evidence"])
        return detector
