"""Prompts read in fixed shapes: several together, in pieces whose widths are powers of two, a graph for each shape.

Letters in shapes: B places, R requests of a pass.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.feature_networks import FeatureNetwork
from inference.graphed.contexts import StaticContext
from inference.graphed.programs import Programs
from inference.graphed.target import ALIGNMENT, StaticTarget
from inference.graphed.written import Written

# Prompts are read together in passes of so many; few sizes, since each is a graph of its own.
_ROWS = (1, 4, 16, 64)
_TOKENS = 8192
_LONGEST_PIECE = 512


@dataclass(frozen=True)
class Places:
    """What is known of the requests on the device; see `inference.graphed.rounds.Rounds`.

    Attributes:
        anchors: int64 `[B]`.
        lengths: int64 `[B]`.
        active: int64 `[B]`.
        written: their tokens; None where nothing is copied from them.
    """

    anchors: Tensor
    lengths: Tensor
    active: Tensor
    written: Written | None


class PromptReader:
    """Lets target and draft read prompts into places.

    Args:
        target: reads.
        network: reads the target's features; None without a draft.
        context: of the draft; None without one.
        places: where requests are.
        programs: keeps what is captured.
    """

    def __init__(
        self,
        target: StaticTarget,
        network: FeatureNetwork | None,
        context: StaticContext | None,
        places: Places,
        programs: Programs,
    ) -> None:
        self._target, self._network, self._context = target, network, context
        self._places, self._programs = places, programs
        self._inputs: dict[tuple[int, int], Tensor] = {}

    def read(self, requests: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Read all of each prompt but its last token, which becomes the anchor. Prompts that are padded to the same
        lengths are read together.

        Args:
            requests: places, all different, and token ids, at least two.
        """
        together: dict[tuple[int, ...], list[tuple[int, Sequence[int]]]] = {}
        for request in requests:
            together.setdefault(tuple(self._piece_widths(len(request[1]) - 1)), []).append(request)
        for widths, members in together.items():
            most = _rows_at_once(widths)
            for first in range(0, len(members), most):
                self._read_together(members[first : first + most], widths)

    def prepare(self, longest: int, *, together: int) -> None:
        """Capture the passes; the first place is left with something in it.

        Args:
            longest: tokens of the longest prompt.
            together: prompts that may be read at once.
        """
        reads = [*range(ALIGNMENT, longest - 1, ALIGNMENT), longest - 1]
        for widths in sorted({tuple(self._piece_widths(read)) for read in reads if read > 0}):
            # As long as these pieces can be, but for what is padded.
            prompt = [0] * (sum(widths[:-1]) + 2)
            for rows in _ROWS:
                if rows <= _rows_at_once(widths) and rows < 4 * together:
                    self._read_together([(0, prompt)] * rows, widths)

    def _read_together(self, requests: Sequence[tuple[int, Sequence[int]]], widths: tuple[int, ...]) -> None:
        """Read prompts in pieces of these widths. The first one fills up the rows of a pass: to read it again changes
        nothing."""
        rows = next(rows for rows in _ROWS if rows >= len(requests))
        filled = [*requests, *[requests[0]] * (rows - len(requests))]
        start = 0
        for width in widths:
            told = []
            for place, prompt in filled:
                count = min(len(prompt) - 1 - start, width)
                told.append([place, start, count, *prompt[start : start + count + 1], *[0] * (width - count)])
            given = torch.tensor(told, pin_memory=self._places.anchors.device.type == "cuda")
            self._inputs_of(rows, width).copy_(given, non_blocking=True)
            shown = min(self._target.capacity, power_of_two(start + width))
            piece = functools.partial(self._piece, rows, width, shown)
            self._programs.run(("prompt", rows, width, shown), piece, compiled=False)
            start += width

    def _piece(self, rows: int, width: int, shown: int) -> None:
        """What is captured."""
        inputs, target, context = self._inputs_of(rows, width), self._target, self._context
        places, starts, counts = inputs[:, :3].t().contiguous()
        tokens = inputs[:, 3:]
        ends = starts + counts
        _, features = target.run(tokens[:, :-1], starts, None if target.batch == 1 else places, shown=shown)
        if context is not None and self._network is not None:
            context.starting(places, starts)
            context.reading(places, counts, width=width)
            self._network.read(features.flatten(0, 1), tokens[:, 1:].flatten(), context)
            context.read(ends)
        if self._places.written is not None:
            self._places.written.write(places, starts, tokens)
        self._places.lengths.index_copy_(0, places, ends)
        # After a prompt's last piece this is its last token.
        self._places.anchors.index_copy_(0, places, tokens.gather(1, counts[:, None])[:, 0])
        self._places.active.index_fill_(0, places, 1)

    def _inputs_of(self, rows: int, width: int) -> Tensor:
        """Pieces of R prompts, int64 `[R, 3 + width + 1]`: place, start, length, tokens and the one after them."""
        if (rows, width) not in self._inputs:
            device = self._places.anchors.device
            self._inputs[rows, width] = torch.zeros(rows, width + 4, dtype=torch.long, device=device)
        return self._inputs[rows, width]

    def _piece_widths(self, read: int) -> Iterator[int]:
        """Widths of the passes over so many tokens of a prompt; what they add up to has room in a place."""
        capacity = self._target.capacity
        longest = max(ALIGNMENT, min(_LONGEST_PIECE, capacity // 2 // ALIGNMENT * ALIGNMENT))
        start = 0
        while start < read:
            width = min(power_of_two(read - start), longest, capacity - start)
            yield width
            start += width


def _rows_at_once(widths: Sequence[int]) -> int:
    """Prompts that are read together in pieces of these widths, at most."""
    return max(rows for rows in _ROWS if rows == 1 or rows * max(widths) <= _TOKENS)


def power_of_two(needed: int) -> int:
    """The smallest power of two that is no less, from `ALIGNMENT` on."""
    size = ALIGNMENT
    while size < needed:
        size *= 2
    return size
