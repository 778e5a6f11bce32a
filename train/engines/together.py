"""What engines of several processes share: sums, random states and failures over those of torch.distributed.

Knows neither how gradients are made nor where weights lie.
"""

import torch
from torch import Tensor, distributed, nn

from train import checkpoint
from train.errors import TrainingError


class Together:
    """Part of an `Engine`: what its processes say to each other beside gradients.

    Attributes:
        rank: this process, from 0.
        size: processes that train together.
    """

    rank: int
    size: int
    _named: list[tuple[str, nn.Parameter]]
    _device: torch.device

    def _start_alike(self) -> None:
        """Start from the first process's weights."""
        if self.size > 1:
            for _, parameter in self._named:
                distributed.broadcast(parameter.data, 0)

    def total(self, values: Tensor) -> Tensor:
        """See `Engine.total`."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def rng(self) -> dict[str, Tensor]:
        """See `Engine.rng`; the first process's under the names that one process uses."""
        mine = checkpoint.rng_states()
        if self._device.type == "cuda":
            current = f"cuda:{torch.cuda.current_device()}"
            mine = {"cpu": mine["cpu"], "cuda:0": mine[current]}
        found = dict(mine)
        for name, state in mine.items():
            parts = [torch.empty_like(state) for _ in range(self.size)]
            distributed.all_gather(parts, state)
            found |= {f"rank{rank}.{name}": part for rank, part in enumerate(parts) if rank}
        return found

    def load_rng(self, states: dict[str, Tensor]) -> bool:
        """See `Engine.load_rng`."""
        saved = 1 + max((int(name[4:].partition(".")[0]) for name in states if name.startswith("rank")), default=0)
        if saved != self.size:
            return False
        prefix = f"rank{self.rank}." if self.rank else ""
        mine = {
            n.removeprefix(prefix): s for n, s in states.items() if n.startswith(prefix) and (prefix or "." not in n)
        }
        torch.set_rng_state(mine["cpu"])
        if self._device.type == "cuda" and "cuda:0" in mine:
            torch.cuda.set_rng_state(mine["cuda:0"])
        return True

    def agree(self, failed: BaseException | None) -> None:
        """See `Engine.agree`."""
        count = float(self.total(torch.tensor([float(failed is not None)], dtype=torch.float64)))
        if failed is not None:
            raise failed
        if count:
            raise TrainingError("another process of this training failed", mend="see its own message")


__all__ = ["Together"]
