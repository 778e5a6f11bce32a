"""Which suffixes look-up goes by: settings alone. The drafter is `inference.drafters.lookup`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LookupSettings:
    """Which suffixes count as a match.

    Attributes:
        longest: longest suffix looked up, in tokens; longer suffixes are tried first.
        shortest: shortest suffix looked up, in tokens.
    """

    longest: int = 4
    shortest: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"need 1 <= shortest <= longest, got {self.shortest} and {self.longest}")
