"""Work of fixed shapes captured as CUDA graphs, by name: warmed up, captured once, replayed; without a GPU the work
itself. Knows nothing of what is done.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inference.errors import InputError

_WARM_UPS = 3
_MOST_PROGRAMS = 256

Work = Callable[[], None]


class Programs:
    """Graphs that share memory. Capturing leaves a state as it was before.

    Args:
        device: where the work runs.
        state: gives the tensors that the work changes and that are to be as before.
        compiled: fuse kernels by torch.compile before they are captured, where that is asked for.
    """

    def __init__(self, device: torch.device, state: Callable[[], Sequence[Tensor]], *, compiled: bool) -> None:
        self._device, self._state, self._compiled = device, state, compiled
        self._captured: dict[tuple[str | int, ...], Work] = {}
        self._pool: Any = None

    @property
    def names(self) -> set[tuple[str | int, ...]]:
        """Of what has been captured, or run."""
        return set(self._captured)

    def run(self, name: tuple[str | int, ...], work: Work, *, compiled: bool) -> None:
        """Replay what was captured under a name, capturing it at its first time."""
        if name not in self._captured:
            self._captured[name] = self.capture(work, compiled=compiled)
        self._captured[name]()

    def capture(self, work: Work, *, compiled: bool) -> Work:
        """The work as a graph.

        Raises:
            InputError: kernels cannot be fused here.
        """
        if self._device.type != "cuda":
            return work
        if compiled and self._compiled:
            work = _fused(work)
        state = [(tensor, tensor.clone()) for tensor in self._state()]

        def restore() -> None:
            for tensor, before in state:
                tensor.copy_(before)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = self._pool or graph.pool()
        restore()
        replay: Work = graph.replay
        return replay


def _fused(work: Work) -> Work:
    """The work with its kernels fused, which the first call does.

    Raises:
        InputError: by that call, they cannot be here: no C compiler, most often.
    """
    # Every shape is a program of its own here, by design.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_PROGRAMS)
    compiled = torch.compile(work, dynamic=False)

    def run() -> None:
        try:
            compiled()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(
                f"kernels cannot be fused here: {reason}",
                where="captured rounds, compiled",
                mend="install a C compiler, or go without compiled",
            ) from error

    return run


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: a graph or an event that is freed while another graph is captured spoils that one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
