"""N-gram look-up: no weights, no training; the control."""

from dataclasses import dataclass

from distill.drafts import DraftContext, write_spec
from inference.lookup_settings import LookupSettings


@dataclass(kw_only=True)
class Config:
    """Which suffixes count as a match; see `inference.lookup_settings.LookupSettings`.

    Attributes:
        kind: this kind.
        longest: longest suffix looked up, in tokens.
        shortest: shortest suffix looked up, in tokens.
    """

    kind: str = "lookup"
    longest: int = 4
    shortest: int = 2

    trained = False

    def __post_init__(self) -> None:
        LookupSettings(longest=self.longest, shortest=self.shortest)

    def write(self, context: DraftContext) -> None:
        """Write `draft.json`."""
        write_spec(context.folder, {"kind": "lookup", "longest": self.longest, "shortest": self.shortest})
