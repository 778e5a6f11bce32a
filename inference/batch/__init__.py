"""Many requests in one target pass: a cache of slots, and the pass over blocks of different widths.

Not a scheduler: who joins, who leaves and how wide a block is are the caller's decisions.
"""

from inference.batch.cache import Placement, SlotCache
from inference.batch.ragged import check_ragged, ragged_logits

__all__ = ["SlotCache", "Placement", "check_ragged", "ragged_logits"]
