"""DSpark's prefix scheduler for requests that share a pass: who gets the next verified token, and when to stop.

Source: DSpark (Cheng et al. 2026), method section 3. A request shows the chance of its next position only, and the one
behind it when that was admitted. So what is decided on a position cannot depend on its own token or a later one, of any
request: the type leaves nothing to look ahead at. Confidences of other requests' admitted tokens may enter; they are
independent of this request's.
"""

from collections.abc import Callable, Sequence
from typing import Protocol


class Prefix(Protocol):
    """The block of one request as far as it is admitted."""

    def survival(self) -> float | None:
        """Chance that all admitted tokens and the next one stand, known before the next is sampled; None at the end."""
        ...

    def admit(self) -> None:
        """Take the next position into the block."""
        ...


def schedule(prefixes: Sequence[Prefix], seconds: Callable[[int], float]) -> list[int]:
    """Admit positions, the likeliest first, while expected tokens a second rise; stop at the first that lowers them.

    Args:
        prefixes: of the requests that share the coming pass; each gets one token from the target in any case.
        seconds: of a round whose pass verifies so many tokens in all, anchors included.

    Returns:
        Positions admitted, by request.
    """
    admitted = [0] * len(prefixes)
    if not prefixes:
        return admitted
    width, tokens = len(prefixes), float(len(prefixes))
    rate = tokens / seconds(width)
    frontier = [prefix.survival() for prefix in prefixes]
    while True:
        waiting = [(chance, -index) for index, chance in enumerate(frontier) if chance is not None]
        if not waiting:
            return admitted
        chance, negative = max(waiting)
        with_it = (tokens + chance) / seconds(width + 1)
        if with_it <= rate:
            return admitted
        width, tokens, rate = width + 1, tokens + chance, with_it
        prefixes[-negative].admit()
        admitted[-negative] += 1
        frontier[-negative] = prefixes[-negative].survival()
