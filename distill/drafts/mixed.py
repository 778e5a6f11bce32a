"""Look-up in front of another draft of the same run; see `inference.drafters.mixed`. Nothing is trained for it."""

import shutil
from dataclasses import dataclass, field
from typing import Any

from distill.drafts import DraftContext, write_spec
from inference.lookup_settings import LookupSettings


@dataclass(kw_only=True)
class Config:
    """Which draft, and which suffixes count as a match.

    Attributes:
        kind: this kind.
        of: names of other drafts; the first that is in the list of drafts is the one. A single name may stand alone.
        longest: longest suffix looked up, in tokens.
        shortest: shortest suffix looked up, in tokens.
        draft_tokens: longest block of the other draft, in tokens; 0 for as long as those of look-up.
    """

    kind: str = "mixed"
    of: Any = field(default_factory=lambda: ["eagle3"])
    longest: int = 4
    shortest: int = 2
    draft_tokens: int = 0

    trained = False

    def __post_init__(self) -> None:
        self.of = [self.of] if isinstance(self.of, str) else self.of
        if not isinstance(self.of, list) or not self.of or not all(isinstance(name, str) for name in self.of):
            raise ValueError(f"draft.mixed.of is {self.of}; name a draft, or several as in [dspark,eagle3]")
        LookupSettings(longest=self.longest, shortest=self.shortest)
        if self.draft_tokens < 0:
            raise ValueError(f"draft.mixed.draft_tokens is {self.draft_tokens}; use 0 or more")

    def write(self, context: DraftContext) -> None:
        """Write `draft.json` and, beside it, a copy of the other draft."""
        from inference.drafters.mixed import INNER_FOLDER

        assert context.other is not None, "the build stage makes the other draft first"
        shutil.copytree(context.other, context.folder / INNER_FOLDER, dirs_exist_ok=True)
        settings = {"longest": self.longest, "shortest": self.shortest, "draft_tokens": self.draft_tokens}
        write_spec(context.folder, {"kind": "mixed", **settings})
