"""Which decoder layers of a target are tapped, by number alone; `inference.features` says what the numbers mean."""

from collections.abc import Sequence

from inference.errors import InputError

EMBEDDING = -1
"""The input of the first layer."""


def default_taps(num_layers: int, count: int = 5) -> list[int]:
    """Layer ids spread evenly from layer 1 to layer n - 3 (DFlash's rule); a single one is the middle layer.

    Few layers give few ids: each appears once.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"cannot tap {count} layers")
    first, last = min(1, num_layers - 1), max(num_layers - 3, min(1, num_layers - 1))
    if count == 1:
        return [num_layers // 2]
    return sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)})


def check_taps(taps: Sequence[int], num_layers: int, *, where: str) -> None:
    """Refuse layer ids that the target does not have.

    Raises:
        InputError: none, one twice, or one out of range.
    """
    wrong = [tap for tap in taps if not EMBEDDING <= tap < num_layers]
    if wrong or not taps or len(set(taps)) < len(taps):
        what = f"layer {wrong[0]} of {num_layers}" if wrong else "no layer" if not taps else "the same layer twice"
        raise InputError(f"cannot tap {what}", where=where, mend=f"name layers from -1 to {num_layers - 1}, once each")
