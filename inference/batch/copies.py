"""Drafters for many requests out of one that is loaded: weights are shared, what belongs to a request is not."""

import copy
from collections.abc import Callable, Iterator

from torch import nn

from inference.drafters import Drafter
from inference.model import CausalModel


def drafter_maker(drafter: Drafter) -> Callable[[], Drafter]:
    """A function that makes drafters like this one, one for each request that runs.

    Caches, indices and counters are copied as they are, and forgotten by `Drafter.begin`; networks and models are the
    very same objects, wherever the drafter or one inside it holds them as an attribute.

    Args:
        drafter: has served no request yet, so that its caches are small; it is not handed out itself.
    """

    def make() -> Drafter:
        return copy.deepcopy(drafter, {id(part): part for part in _weights(drafter)})

    return make


def _weights(part: object) -> Iterator[object]:
    """Networks and models among the attributes, and among those of drafters within."""
    for value in vars(part).values():
        if isinstance(value, nn.Module | CausalModel):
            yield value
        elif isinstance(value, Drafter):
            yield from _weights(value)
