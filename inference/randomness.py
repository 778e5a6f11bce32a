"""The two random decisions of speculative decoding, behind one small interface.

The decoder draws nothing else. `TorchSource` draws for real; a test can put an enumerator in its place that walks
every outcome with its exact probability, which is how the output law is checked to 1e-12 on the decoder's own code.
"""

from typing import Protocol

import torch


class Source(Protocol):
    """Where random decisions come from."""

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        """Draw an index from `probs` of shape `[V]`; returns an int64 tensor of shape `[]`."""
        ...

    def accepted_prefix(self, ratios: torch.Tensor) -> int:
        """Number of leading successes of independent trials with the given chances, shape `[l]`, each in [0, 1]."""
        ...


class TorchSource:
    """Draws from a `torch.Generator`, so one seed fixes a whole request."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    @classmethod
    def seeded(cls, seed: int, *, device: torch.device | str = "cpu") -> "TorchSource":
        """A source of its own for one request."""
        return cls(torch.Generator(device=device).manual_seed(seed))

    def categorical(self, probs: torch.Tensor) -> torch.Tensor:
        """See `Source.categorical`."""
        return draw(probs, generator=self.generator)

    def accepted_prefix(self, ratios: torch.Tensor) -> int:
        """See `Source.accepted_prefix`."""
        draws = torch.rand(ratios.shape, dtype=ratios.dtype, device=ratios.device, generator=self.generator)
        return int((draws < ratios).long().cumprod(0).sum())


def draw(probs: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """One index per row by inverting the cumulative distribution, summed in fp64.

    Far cheaper on a CPU than `torch.multinomial` (docs/experiments.md). A token without mass is never drawn, but for a
    product that rounds up to the whole sum (chance about 1e-16): the first index whose sum exceeds the draw has mass.

    Args:
        probs: `[..., V]`, each row with a positive sum; need not be normalised exactly.
        generator: on the device of `probs`.

    Returns:
        int64 `[...]`.
    """
    uniforms = torch.rand(probs.shape[:-1], dtype=torch.float64, device=probs.device, generator=generator)
    return drawn(probs, uniforms)


def drawn(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The index of each row that a number in [0, 1) stands for; see `draw`.

    Args:
        probs: `[..., V]`, as `draw` takes them.
        uniforms: fp64 `[...]`.

    Returns:
        int64 `[...]`.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, uniforms[..., None] * cumulative[..., -1:], right=True)
    # u < 1, but u * total can round up to the total itself.
    return index.clamp(max=probs.shape[-1] - 1)[..., 0]
