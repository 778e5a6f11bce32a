"""Prompts from a data set that the `datasets` library reads: a name on the hub, a folder of files, or a saved data set.

Not a reader of answers: of a conversation column only the user's turns and the system message are kept. Example:
`prompts=[dataset] prompts.dataset.path=HuggingFaceH4/ultrachat_200k prompts.dataset.split=train_sft`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.prompts import Prompt, SourceConfig, SourceContext
from distill.prompts._messages import conversation_turns
from inference.errors import InputError


@dataclass
class Config(SourceConfig):
    """A `datasets` name or a local folder."""

    kind: str = "dataset"
    path: str = ""
    """Name on the hub, or a local folder: data files (parquet, JSON, CSV, text) or what `save_to_disk` wrote."""
    name: str = ""
    """Configuration of the data set, where it has several (empty = its default)."""
    revision: str = ""
    """Commit or tag on the hub; pin it for a corpus that can be made again (empty = newest)."""
    split: str = "train"
    """Split to read; slices such as `train[:1000]` work for names and folders of data files."""
    column: str = "messages"
    """Column with a text, a list of texts (user turns), or a list of messages (role/content or from/value)."""
    system_column: str = ""
    """Column with a system message, which then wins over one among the messages (empty = none)."""
    id_column: str = ""
    """Column that names the prompt (empty = row number)."""

    def read(self, context: SourceContext) -> list[Prompt]:
        """Read every row.

        Raises:
            InputError: the data set, split or column does not exist, or a row holds no user turn.
        """
        if not self.path:
            raise InputError(
                "no data set given", where="prompts (kind dataset): path", mend="set path to a name or folder"
            )
        rows = _load(self)
        for column in filter(None, (self.column, self.system_column, self.id_column)):
            if column not in rows.column_names:
                raise InputError(
                    f"no column {column!r}", where=self.path, mend=f"choose one of {', '.join(rows.column_names)}"
                )
        prompts: list[Prompt] = []
        for number, row in enumerate(rows):
            system, turns = conversation_turns(row[self.column], where=f"{self.path}, row {number}")
            system = (row[self.system_column] or system) if self.system_column else system
            name = str(row[self.id_column]) if self.id_column else f"row-{number}"
            prompts.append(Prompt(name, self.domain, self.kind, turns, system=system, heldout=self.heldout))
        if not prompts:
            raise InputError(f"split {self.split!r} has no rows", where=self.path, mend="choose another split")
        return prompts


def _load(cfg: Config) -> Any:
    """Return the split as a `datasets.Dataset`; `datasets` is imported here because it is slow to import."""
    import datasets

    folder = Path(cfg.path).expanduser()
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[cfg.split]
        path = str(folder) if folder.exists() else cfg.path
        return datasets.load_dataset(path, cfg.name or None, split=cfg.split, revision=cfg.revision or None)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"cannot load split {cfg.split!r}: {first_line}",
            where=cfg.path,
            mend="check path, name and split; without a network, give a local folder",
        ) from error
