"""What counts as drift."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DriftConfig:
    """The monitor's settings.

    Attributes:
        log: folder of the traffic log.
        tolerance: fall of the mean acceptance rate of requests that is put up with.
        threshold: evidence at which acceptance is said to have fallen; without drift it takes at least so many
            requests, on average, until a false alarm.
        lambdas: bets of the detectors.
        mix_threshold: evidence at which the mix of domains is said to have moved.
    """

    log: str = "traffic"
    tolerance: float = 0.01
    threshold: float = 10_000.0
    lambdas: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 3.0])
    mix_threshold: float = 1_000_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"drift.tolerance is {self.tolerance}; use 0 or more, below 1")
        if not self.threshold > 1 or not self.mix_threshold > 1:
            raise ValueError("drift.threshold and drift.mix_threshold must be above 1")
        if not self.lambdas or min(self.lambdas) <= 0:
            raise ValueError(f"drift.lambdas is {self.lambdas}; give at least one bet, all above 0")
