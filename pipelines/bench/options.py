"""What the command line says to all rows of the benchmark. Light: reading it imports no model library."""

from dataclasses import dataclass
from pathlib import Path

from inference.pair_files import DEFAULT_CACHE
from inference.target import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line.

    Attributes:
        folder: where results and what is made on the way go.
        pair: a published version, for the rows that decode with one; None for the draft that comes with dspark.
        draft: folder of a language model that drafts, with `draft.json`; None for one cut out of the target.
        target: `embedded`, a folder or an id; the pair's own where a pair is given.
        revision: of an id.
        precision: of our arms; `auto` for what the device profile finds fastest for each use.
        device: see `inference.target.TargetConfig`.
        cache: where converted models and device profiles are kept.
        prompts: most prompts of a row.
        prompt_file: JSONL of prompts; None for the held-out questions that come with the environment.
        max_new_tokens: longest answer.
        threads: of the processor; 0 for torch's own number.
        seed: of orders, draws and intervals.
    """

    folder: Path
    pair: Path | None = None
    draft: Path | None = None
    target: str = EMBEDDED
    revision: str = ""
    precision: str = "auto"
    device: str = "auto"
    cache: Path = DEFAULT_CACHE
    prompts: int = 12
    prompt_file: Path | None = None
    max_new_tokens: int = 96
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; use at least 1")
