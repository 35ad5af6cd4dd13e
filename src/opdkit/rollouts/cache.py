"""A key-value cache for sampling: tokens are appended in place, and rows that are done give their slot to a live one.

Axes: r rows that decode now, H key-value heads, C capacity of the buffer in tokens, d width of a head.

transformers' DynamicLayer concatenates, so every token copies the whole cache; here it copies one column, and removing
a row copies at most one row. Sliding-window and linear-attention layers keep transformers' own classes. Left out: what
sampling never calls (crop, offloading, reset).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens: the least by which a buffer grows


class BufferLayer(DynamicLayer):
    """A full-attention layer whose keys and values are views [r, H, t, d] of buffers [R, H, C, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.room: list[Tensor] = []  # buffers of keys and of values; none before the first `reorder_cache`

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens [r, H, n, d]. Returns all keys and all values so far."""
        start = self.get_seq_length()
        if start == 0:  # the prefill: its states are copied once its rows are known
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        rows, stop = key_states.shape[0], start + key_states.shape[2]
        if not self.room or stop > self.room[0].shape[2]:
            self._move(torch.arange(rows, device=key_states.device), stop)
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[:rows, :, start:stop] = new
        self.keys, self.values = (buffer[:rows, :, :stop] for buffer in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; more rows than before are the prefill's, shared by a group."""
        rows, length = beam_idx.shape[0], self.get_seq_length()
        if not self.room or rows > self.room[0].shape[0]:
            return self._move(beam_idx, length)
        moved = torch.nonzero(beam_idx != torch.arange(rows, device=beam_idx.device)).squeeze(1)
        for buffer in self.room if moved.numel() else []:
            buffer[moved, :, :length] = buffer[beam_idx[moved], :, :length]
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self.room)

    def _move(self, index: Tensor, need: int) -> None:
        """Put rows `index` into new buffers with room for `need` tokens and half as many again."""
        length, capacity = self.get_seq_length(), need + max(ROOM, need // 2)
        moved = []
        assert self.keys is not None and self.values is not None
        for old in (self.keys, self.values):
            buffer = old.new_empty(index.shape[0], old.shape[1], capacity, old.shape[3])
            buffer[:, :, :length] = old[index]
            moved.append(buffer)
        self.room = moved
        self.keys, self.values = (buffer[:, :, :length] for buffer in moved)


def make_cache(config: Any) -> Any:
    """An empty transformers cache for a model's configuration, with BufferLayer wherever attention is full."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
