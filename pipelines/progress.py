"""How far a stage is: a bar on a terminal, at most one log line a second elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def tracked(items: Sequence[Item], title: str, *, unit: str) -> Iterator[Item]:
    """Yield items and report how many are done.

    Args:
        items: what is worked through.
        title: of the stage.
        unit: what the items are, in the plural.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=f"{title} ({unit})", console=Console(stderr=True))
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= 1.0 or done == len(items):
            last = now
            left = (now - start) / done * (len(items) - done)
            logger.info("%s: %d of %d %s, %.0f s left", title, done, len(items), unit, left)
