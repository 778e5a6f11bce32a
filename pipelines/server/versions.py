"""Versions of a pair: loaded for serving, told apart by what their path leads to, and named for clients."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from inference.batch.copies import drafter_maker
from inference.batch.costs import LoadCosts
from inference.batch.engine import BatchEngine
from inference.drafters.none import NoDrafter
from inference.errors import InputError, first_line
from inference.graphed.asked import CAPTURED_OFF
from inference.lookahead.fixed import FixedLookahead
from inference.pair import Pair, load_pair
from inference.pair_files import PAIR_FILE
from inference.target import stop_tokens
from inference.traffic import pair_label
from pipelines.server.settings import PairSettings

Identity = tuple[str, int, int]
"""Folder, inode and time of change of a `pair.json`."""


@dataclass(frozen=True, eq=False)
class Version:
    """One version of the pair, ready to serve.

    Attributes:
        pair: as it was loaded.
        engine: that decodes with it.
        stops: tokens that end an answer.
        label: name and version, as in "smollm2-135m/v3", or the folder's name for a pair that was never published.
    """

    pair: Pair
    engine: BatchEngine
    stops: frozenset[int]
    label: str

    @property
    def name(self) -> str:
        """Of the pair, without the version."""
        return str(self.pair.info.get("name") or self.label)

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.target.context_limit


def identity(folder: Path) -> Identity:
    """What a path leads to now; another value once an alias has moved or a pair was written anew."""
    try:
        real = folder.resolve(strict=True)
        found = os.stat(real / PAIR_FILE)
    except OSError:
        return str(folder.resolve()), 0, 0
    return str(real), found.st_ino, found.st_mtime_ns


def load_version(settings: PairSettings, *, beside: Version | None = None) -> Version:
    """Load what the path leads to now. An alias is followed once, so that no version is mixed from two.

    Args:
        settings: of the pair.
        beside: the version that is serving; a target that is the same is shared with it.

    Raises:
        InputError: it is no pair that can be served.
    """
    folder = Path(identity(settings.folder)[0])
    pair = load_pair(
        folder,
        target=settings.target,
        device=settings.device,
        cache=settings.cache,
        other_target=settings.other_target,
        beside=None if beside is None else beside.pair,
        captured=CAPTURED_OFF,
    )
    lookahead = pair.lookahead if settings.lookahead is None else FixedLookahead(settings.lookahead)
    engine = BatchEngine(
        pair.target,
        NoDrafter if lookahead.longest == 0 else drafter_maker(pair.drafter),
        lookahead,
        max_requests=settings.max_requests,
        max_cache_tokens=settings.max_cache_tokens,
        costs=None if settings.load_costs is None else _costs(settings.load_costs, pair.target.precision),
    )
    return Version(pair, engine, stop_tokens(pair.target), pair_label(pair.info) or folder.name)


def _costs(path: Path, precision: str) -> LoadCosts:
    """What `dspark load` measured in one arithmetic.

    Raises:
        InputError: there is no such file, or it holds none of that arithmetic.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"no costs under load here ({first_line(error)})",
            where=str(path),
            mend="give load_costs.json of: dspark load",
        ) from None
    if not isinstance(known, dict) or precision not in known:
        raise InputError(f"no costs under load in {precision}", where=str(path), mend="measure them: dspark load")
    return LoadCosts.from_json(known[precision], where=str(path))
