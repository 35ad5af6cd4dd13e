"""Key-value caches for sampling: tokens are appended in place, and rows that are done give their slot to a live one.

Axes: R rows at the start, r rows that decode now, P prompts, G key-value heads, H query heads, m = H / G, C capacity of
a buffer in tokens, t tokens so far, T prompt tokens, d width of a head, HD = H d, n most live rows of one prompt.

transformers' DynamicLayer concatenates, so every token copies the whole cache; here it copies one column, and removing
a row copies at most one row. `BufferLayer` stands in for it. `Part` goes further for the models that `body` knows: the
keys of a prompt exist once for its whole group, which reads them as one matrix product. Sliding-window and
linear-attention layers keep transformers' own classes. Left out: what sampling never calls (crop, offloading, reset).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from opdkit.layers import SHORT, batched_attention

# What transformers calls a cache among a model's arguments and in its output: renamed in 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ROOM = 64  # tokens: the least by which a buffer grows
SHARED = (
    64  # prompt tokens from which on a group's rows read one copy: below, one call of attention is cheaper than two
)


class Buffer:
    """Keys and values [r, G, t, d] as views of tensors [R, G, C, d]."""

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        """Start with rows `index` of keys and values [P, G, t, d]."""
        self.rows, self.length = index.shape[0], keys.shape[2]
        self.room = [keys, values]
        self._move(index, self.length)

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add keys and values [r, G, k, d] of new tokens. Returns all of both."""
        start, stop = self.length, self.length + new[0].shape[2]
        if stop > self.room[0].shape[2]:
            self._move(torch.arange(self.rows, device=new[0].device), stop)
        self.length = stop
        found = self.views()
        for live, states in zip(found, new, strict=True):
            live.narrow(2, start, stop - start).copy_(states)
        return found

    def views(self) -> list[Tensor]:
        """Keys and values of the live rows [r, G, t, d]."""
        live = self.room if self.rows == self.room[0].shape[0] else [b.narrow(0, 0, self.rows) for b in self.room]
        return [buffer.narrow(2, 0, self.length) for buffer in live]

    def keep(self, order: Int[Tensor, " r"]) -> None:
        """Row i becomes what row order[i] was; there are no more rows than before."""
        self.rows = order.shape[0]
        moved = torch.nonzero(order != torch.arange(self.rows, device=order.device)).squeeze(1)
        for buffer in self.room if moved.numel() else []:
            buffer[moved, :, : self.length] = buffer[order[moved], :, : self.length]

    def _move(self, index: Int[Tensor, " r"], need: int) -> None:
        """Put rows `index` into new tensors with room for `need` tokens and half as many again."""
        capacity, moved = need + max(ROOM, need // 2), []
        for old in self.room:
            buffer = old.new_empty(index.shape[0], old.shape[1], capacity, old.shape[3])
            buffer[:, :, : self.length] = old[index, :, : self.length]
            moved.append(buffer)
        self.room = moved


class BufferLayer(DynamicLayer):
    """A full-attention layer of transformers' cache whose keys and values are a Buffer's."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer: Buffer | None = None  # none before the first `reorder_cache`

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens [r, G, k, d]. Returns all keys and all values so far."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(
            kind
        ):  # rotary angles make float32 keys, but attention reads them in half precision
            key_states, value_states = (s.to(torch.get_autocast_dtype(kind)) for s in (key_states, value_states))
        if self.get_seq_length() == 0:  # the prefill: its states are copied once its rows are known
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if self.buffer is None:
            self.reorder_cache(torch.arange(key_states.shape[0], device=key_states.device))
        assert self.buffer is not None
        self.keys, self.values = self.buffer.append(key_states, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; at first the rows are the prefill's, shared by a group."""
        assert self.keys is not None and self.values is not None
        if self.buffer is None:
            self.buffer = Buffer(self.keys, self.values, beam_idx)
        else:
            self.buffer.keep(beam_idx)
        self.keys, self.values = self.buffer.views()


def make_cache(config: Any) -> Any:
    """An empty transformers cache for a model's configuration, with BufferLayer wherever attention is full."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def states_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P, G, t, d] of every layer of a transformers cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class Part:
    """Rows that started together from prompts that were read by one forward pass: what `body` keeps of them."""

    def __init__(
        self, states: Sequence[tuple[Tensor, Tensor]], owner: Int[Tensor, " R"], padding: Tensor | None,
        dtype: torch.dtype, shared: bool,
    ) -> None:  # fmt: skip
        """Row i goes on from prompt owner[i], whose keys and values [P, G, T, d] are the `states` of every layer.

        `padding` [P, T] is true at columns to be passed over.

        The prompts' keys are kept once per prompt if `shared`, else copied to each row.
        """
        read = [tuple(s.to(dtype).contiguous() for s in both) for both in states]
        self.prompts = read if shared else []
        stop = 0 if shared else None
        self.own = [Buffer(k[:, :, :stop], v[:, :, :stop], owner) for k, v in read]
        self.owner, self.mask = owner.cpu(), None
        if padding is not None:
            mask = torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill(padding, -torch.inf)
            self.mask = (mask if shared else mask[owner])[:, None, None]
        self._place()

    @property
    def rows(self) -> int:
        return self.owner.shape[0]

    def keep(self, order: Int[Tensor, " r"]) -> None:
        """Row i becomes what row order[i] was."""
        for buffer in self.own:
            buffer.keep(order)
        self.owner = self.owner[order.cpu()]
        if not self.prompts:
            self.mask = None if self.mask is None else self.mask[order]
            return
        alive, self.owner = self.owner.unique(return_inverse=True)
        if alive.shape[0] < self.prompts[0][0].shape[0]:
            alive = alive.to(order.device)
            self.prompts = [(k[alive], v[alive]) for k, v in self.prompts]
            self.mask = None if self.mask is None else self.mask[alive]
        self._place()

    def _place(self) -> None:
        """Lay the rows out as [P, n]: which row stands where, and where each row stands."""
        if not self.prompts:
            return
        counts = self.owner.bincount()
        self.most, order = int(counts.max()), self.owner.argsort(stable=True)
        column = torch.arange(self.rows) - (counts.cumsum(0) - counts)[self.owner[order]]
        place = torch.empty_like(order)
        place[order] = self.owner[order] * self.most + column
        slots = torch.zeros(counts.shape[0] * self.most, dtype=torch.long)
        slots[place] = torch.arange(self.rows)
        device = self.own[0].room[0].device
        aligned = torch.equal(slots, torch.arange(self.rows))
        self.slots = None if aligned else slots.to(device)
        self.place = None if aligned else place.to(device)

    def attend(
        self, layer: int, query: Float[Tensor, "r G m d"], key: Float[Tensor, "r G d"], value: Float[Tensor, "r G d"],
        scale: float,
    ) -> Float[Tensor, "r HD"]:  # fmt: skip
        """Add one token's key and value of each row, and read all of them."""
        keys, values = self.own[layer].append(key[:, :, None], value[:, :, None])
        if self.prompts:
            out, norm = attention(query, keys, values, None, scale)
            theirs, other = self._attend_prompts(layer, query, scale)
            return out.lerp(theirs, torch.sigmoid(other - norm)[..., None].to(out.dtype)).flatten(1)
        mask = self._grown(keys.shape[2])
        if keys.shape[2] <= SHORT and keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.float64):
            bias = None if mask is None else mask.expand(*query.shape[:3], -1).flatten(0, 1)
            return batched_attention(query, keys, values, bias, scale).flatten(1)
        return attention(query, keys, values, mask, scale)[0].flatten(1)

    def _grown(self, length: int) -> Float[Tensor, "r 1 1 t"] | None:
        """The rows' own mask with columns for `length` tokens; every layer of a token reads the same."""
        if self.mask is not None and self.mask.shape[3] < length:
            self.mask = F.pad(self.mask, (0, length - self.mask.shape[3]))
        return self.mask

    def _attend_prompts(self, layer: int, query: Float[Tensor, "r G m d"], scale: float) -> tuple[Tensor, Tensor]:
        """Attention of each row to its prompt: [r, G, m, d], and the log of its norm [r, G, m]."""
        keys, values = self.prompts[layer]
        grid = query if self.slots is None else query.index_select(0, self.slots)
        grid = grid.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)  # [P, G, n * m, d]
        found = attention(grid, keys, values, self.mask, scale)
        out, norm = (x.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1) for x in found)
        return (
            (out, norm) if self.place is None else (out.index_select(0, self.place), norm.index_select(0, self.place))
        )


def attention(
    query: Float[Tensor, "B G q d"], keys: Float[Tensor, "B G t d"], values: Float[Tensor, "B G t d"],
    mask: Float[Tensor, "B 1 1 t"] | None, scale: float,
) -> tuple[Float[Tensor, "B G q d"], Float[Tensor, "B G q"]]:  # fmt: skip
    """softmax(scale q k + mask) v, where every query reads every key, and the log of its norm (nats)."""
    if query.device.type == "cpu":
        return fused(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    return unfused(query, keys, values, mask, scale)


def unfused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` where PyTorch has no kernel that returns the norm for any dtype and mask."""
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    scores = scores if mask is None else scores + mask
    norm = scores.logsumexp(-1)
    return (scores - norm[..., None]).exp().to(values.dtype) @ values, norm
