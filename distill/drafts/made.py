"""A draft that is already made: trained on another machine, or taken from a published pair, and scored on this one."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from distill.drafts import DraftContext
from inference.drafters import DRAFT_FILE, read_draft_spec
from inference.errors import InputError


@dataclass(kw_only=True)
class Config:
    """Where the draft is.

    Attributes:
        kind: this kind.
        path: folder that holds `draft.json`, or the folder of an artifact or pair with such a `draft` folder in it.
    """

    kind: str = "made"
    path: str = ""

    trained = False

    def write(self, context: DraftContext) -> None:
        """Copy the draft; whether it fits the target shows when it is loaded.

        Raises:
            InputError: no path, or no draft there.
        """
        if not self.path:
            raise InputError("which draft?", where="draft.made.path", mend="set it to a folder with draft.json")
        folder = Path(self.path)
        if not (folder / DRAFT_FILE).is_file() and (folder / "draft" / DRAFT_FILE).is_file():
            folder = folder / "draft"
        read_draft_spec(folder)
        shutil.copytree(folder, context.folder, dirs_exist_ok=True)
