"""No draft: target-only decoding, always a candidate, so that a pair is published only when speculation pays."""

from dataclasses import dataclass

from distill.drafts import DraftContext, write_spec


@dataclass(kw_only=True)
class Config:
    """Nothing to set."""

    kind: str = "none"

    trained = False

    def write(self, context: DraftContext) -> None:
        """Write `draft.json`."""
        write_spec(context.folder, {"kind": "none"})
