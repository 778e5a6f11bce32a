"""A key-value cache that rolls back in constant time. Not a scheduler: one object serves one request or one batch.

transformers' own dynamic cache concatenates on every pass, so a round that verifies six tokens copies the whole
context twice per layer; here keys and values are written into buffers that grow by doubling, and a rollback only
moves the length.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

_INITIAL_CAPACITY = 256


class RollbackLayer(DynamicLayer):
    """Keys and values of one layer, `[batch, kv_heads, capacity, head_dim]`, of which `length` positions are valid."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shape, dtype and device from the first states; the buffers themselves come with the first write."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self._value_buffer = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape `[batch, kv_heads, new, head_dim]` and return views of everything valid."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            capacity = max(_INITIAL_CAPACITY, 2 * self._key_buffer.shape[-2], end)
            self._key_buffer = self._grown(self._key_buffer, capacity)
            self._value_buffer = self._grown(self._value_buffer, capacity)
        self._key_buffer[:, :, self.length : end] = key_states
        self._value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self._expose()

    def get_seq_length(self) -> int:
        """Number of valid positions."""
        return self.length

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on."""
        if length > self.length:
            raise ValueError(f"cannot roll forward from {self.length} to {length} positions")
        self.length = length
        if self.is_initialized:
            self._expose()

    def move(self, source: int, destination: int) -> None:
        """Let one position's states stand at another: both lie in the buffers, which a rollback does not clear."""
        for buffer in (self._key_buffer, self._value_buffer):
            buffer[:, :, destination] = buffer[:, :, source]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows of the batch, in the given order."""
        if self.is_initialized:
            self._key_buffer = self._key_buffer[indices]
            self._value_buffer = self._value_buffer[indices]
            self._expose()

    def nbytes(self) -> int:
        """Bytes held by the two buffers."""
        return self._key_buffer.nbytes + self._value_buffer.nbytes if self.is_initialized else 0

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[-1]))
        grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown

    def _expose(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._key_buffer[:, :, : self.length], self._value_buffer[:, :, : self.length]
        self.keys, self.values = keys, values
        return keys, values


class RollbackCache(Cache):
    """One `RollbackLayer` per decoder layer; sliding-window layers keep all positions and are masked by the model."""

    def __init__(self, num_layers: int) -> None:
        self.rollback_layers = [RollbackLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.rollback_layers])

    @classmethod
    def for_config(cls, config: PreTrainedConfig) -> "RollbackCache":
        """An empty cache for a model of this configuration."""
        return cls(config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def length(self) -> int:
        """Number of valid positions."""
        return self.get_seq_length()

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on, in all layers."""
        for layer in self.rollback_layers:
            layer.rollback(length)

    def move(self, source: int, destination: int) -> None:
        """Let the states of one position stand at another, in all layers."""
        for layer in self.rollback_layers:
            layer.move(source, destination)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows of the batch, in the given order, in all layers."""
        for layer in self.rollback_layers:
            layer.batch_select_indices(indices)

    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(layer.nbytes() for layer in self.rollback_layers)
