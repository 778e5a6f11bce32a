"""Many requests decoded together: a cache of slots, one pass over blocks of different widths, and the engine."""

from inference.batch.cache import Placement, SlotCache
from inference.batch.engine import BatchEngine, Handle, Outcome, QueueFull
from inference.batch.ragged import check_ragged, ragged_logits

__all__ = ["BatchEngine", "Handle", "Outcome", "Placement", "QueueFull", "SlotCache", "check_ragged", "ragged_logits"]
