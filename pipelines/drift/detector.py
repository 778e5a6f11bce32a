"""An e-detector of falling acceptance: evidence that may be looked at after every request.

Fed request-level rates in [0, 1], never tokens: acceptances of one request's tokens hang together, and a test that
takes them for independent raises false alarms all the time.

For every bet lambda the evidence is M <- max(M, 1) (1 + lambda (ref - tol - x)): an e-process restarted wherever it has
fallen below 1. While the mean of x, given what came before, is at least ref - tol, each factor is 1 or less in
expectation, so the sum of e-processes started at every time so far grows by 1 a request at most, and M is no larger
than that sum. The first time that M reaches a threshold therefore comes after at least that many requests on average
(Shin, Ramdas and Rinaldo 2023, "E-detectors", theorem 2.4); the same holds for means of such M over bets.
"""

from typing import Any

# Beyond any threshold; more would overflow, and infinity times zero is no number.
_MOST = 1e200


class EDetector:
    """Detector of one stratum.

    Args:
        reference: mean rate that was published.
        tolerance: fall that is put up with.
        lambdas: bets; those at which one request could ruin the detector are lowered.
    """

    def __init__(self, *, reference: float, tolerance: float, lambdas: list[float]) -> None:
        self.bound = reference - tolerance
        most = 1 / (1 - self.bound) if self.bound < 1 else float("inf")
        self.lambdas = [min(value, most) for value in lambdas]
        self.evidence = [0.0] * len(lambdas)
        self.count = 0

    @property
    def statistic(self) -> float:
        """Mean of the evidence over bets."""
        return sum(self.evidence) / len(self.evidence)

    def update(self, rate: float) -> None:
        """Take in one request's acceptance rate.

        Raises:
            ValueError: it is no rate.
        """
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{rate} is no rate between 0 and 1")
        self.evidence = [
            min(_MOST, max(evidence, 1.0) * max(0.0, 1.0 + bet * (self.bound - rate)))
            for evidence, bet in zip(self.evidence, self.lambdas, strict=True)
        ]
        self.count += 1

    def to_json(self) -> dict[str, Any]:
        """Everything needed to go on exactly."""
        return {"bound": self.bound, "lambdas": self.lambdas, "evidence": self.evidence, "count": self.count}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EDetector":
        """Go on from `to_json`."""
        detector = cls(reference=float(data["bound"]), tolerance=0.0, lambdas=list(data["lambdas"]))
        detector.lambdas = [float(value) for value in data["lambdas"]]
        detector.evidence, detector.count = [float(value) for value in data["evidence"]], int(data["count"])
        return detector
