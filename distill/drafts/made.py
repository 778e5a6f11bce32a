"""A draft that is already made: trained on another machine, or taken from a published pair, and scored on this one."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from distill.drafts import DraftContext
from inference.errors import InputError
from inference.pair_files import DRAFT_FILE, read_draft_spec


@dataclass(kw_only=True)
class Config:
    """Where the draft is.

    Attributes:
        kind: this kind.
        path: folder that holds `draft.json`, or the folder of an artifact or pair with such a `draft` folder in it.
        optional: leave it out, and whatever needs it, where it is not there or was made for another kind of target.
    """

    kind: str = "made"
    path: str = ""
    optional: bool = False

    trained = False

    def left_out(self, target_folder: Path) -> str:
        """Why an optional draft is no candidate for a target; empty when it is one."""
        if not self.optional:
            return ""
        if not self.path or not (self._folder() / DRAFT_FILE).is_file():
            return "it is not there"
        from inference.feature_networks._checkpoint import misfit

        return misfit(self._folder(), target_folder)

    def write(self, context: DraftContext) -> None:
        """Copy the draft; whether it fits the target shows when it is loaded.

        Raises:
            InputError: no path, or no draft there.
        """
        if not self.path:
            raise InputError("which draft?", where="draft.made.path", mend="set it to a folder with draft.json")
        folder = self._folder()
        read_draft_spec(folder)
        shutil.copytree(folder, context.folder, dirs_exist_ok=True)

    def _folder(self) -> Path:
        """The folder that should hold `draft.json`."""
        folder = Path(self.path)
        inner = folder / "draft"
        return inner if not (folder / DRAFT_FILE).is_file() and (inner / DRAFT_FILE).is_file() else folder
