"""Whole rows through the layers of a Llama-like model, written out: what transformers computes, where it is read.

Axes: B rows, T positions, M = all tokens, n trained tokens, E tokens whose last state is read, Q most of them in a row,
H query heads, G key-value heads, d width of a head, D hidden.

Scoring and the update read the states that predict trained tokens. So the last layer needs keys and values of every token
and all the rest, four fifths of its work, for these alone: with prompts as long as responses a model of three layers
saves an eighth, forward and backward. Used for the classes of `layers` in float32 and float64 without autocast, after
a trial against transformers' own pass when the model is loaded (`agrees`); other models go through theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from opdkit.layers import SHORT, angles, batched_attention, rms_norm, turn, written_out
from opdkit.models import LanguageModel
from opdkit.packing import NAME, TRIAL, Pack, Text, attend, pack
from opdkit.products import rounded


@dataclass(frozen=True)
class Padded:
    """Rows padded on the right; every trained token is an end, and then some zeros are that nobody reads."""

    ids: Int[Tensor, " M"]
    positions: Int[Tensor, " M"]
    ends: Int[Tensor, " E"]
    shape: tuple[int, int]  # B, T
    slots: Int[Tensor, " n"]  # where each trained token stands in a grid [B, Q]
    mask: Bool[Tensor, "B 1 Q T"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], read: Sequence[Sequence[int]], device: torch.device) -> "Padded":
        """Token ids of every row, and the positions in it whose states are read, in rising order."""
        width, most = max(map(len, rows)), max(1, *map(len, read))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        places = torch.tensor([[*at, *[0] * (most - len(at))] for at in read], device=device)  # [B, Q]
        slots = torch.tensor([row * most + i for row, at in enumerate(read) for i in range(len(at))]).long().to(device)
        columns = torch.arange(width, device=device)
        ends = (places + width * torch.arange(len(rows), device=device)[:, None]).flatten()[slots]
        ends = F.pad(ends, (0, rounded(len(ends)) - len(ends)))
        positions = columns.repeat(len(rows))
        return cls(ids.flatten(), positions, ends, (len(rows), width), slots, (columns <= places[..., None])[:, None])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, last: bool) -> Float[Tensor, "q Hd"]:
        share = q.shape[1] // k.shape[1]
        key, value = (repeat_kv(t.unflatten(0, self.shape).transpose(1, 2), share) for t in (k, v))
        grid = q
        if last:
            grid = q.new_zeros(self.shape[0] * self.mask.shape[2], *q.shape[1:])
            grid = grid.index_copy(0, self.slots, q[: len(self.slots)])
        query = grid.unflatten(0, (self.shape[0], -1)).transpose(1, 2)
        if self.shape[1] <= SHORT:
            found = short_attention(query, key, value, self.mask if last else None, scale)
        else:
            mask = self.mask if last else None
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not last, scale=scale)
        flat = found.transpose(1, 2).flatten(0, 1).flatten(1)
        if not last:
            return flat
        return F.pad(flat.index_select(0, self.slots), (0, 0, 0, len(self.ends) - len(self.slots)))

    def chosen(self, states: Float[Tensor, "E D"]) -> Float[Tensor, "n D"]:
        return states[: len(self.slots)]


def short_attention(
    q: Float[Tensor, "B H Q d"], k: Float[Tensor, "B H T d"], v: Float[Tensor, "B H T d"],
    mask: Bool[Tensor, "B 1 Q T"] | None, scale: float,
) -> Float[Tensor, "B H Q d"]:  # fmt: skip
    """softmax(scale q k^T) v by batched products, causal without a mask.

    With rows this short the fused kernel spends its time on blocks of one row and head, forward and backward.
    """
    seen = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
    bias = q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    bias = bias.expand(q.shape[0], q.shape[1], -1, -1).flatten(0, 1)
    return batched_attention(q, k, v, bias, scale)


class Packed:
    """Rows in one without padding (`packing`)."""

    def __init__(self, found: Pack, device: torch.device) -> None:
        self.ids, self.positions, self.ends = (t.to(device) for t in (found.ids[0], found.positions[0], found.ends))
        place = torch.zeros(found.ids.shape[1], dtype=torch.long)
        place[found.ends] = torch.arange(found.ends.shape[0])
        self.places = place[found.rows].to(device)
        self.stretches = found.stretches, found.end_stretches

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, last: bool) -> Float[Tensor, "q Hd"]:
        query, key, value = (t.transpose(0, 1)[None] for t in (q, k, v))
        return attend(query, key, value, self.stretches[last], scale)[0].transpose(0, 1).flatten(1)

    def chosen(self, states: Float[Tensor, "E D"]) -> Float[Tensor, "n D"]:
        return states.index_select(0, self.places)


# Both have the tokens `ids` and `positions` [M], the `ends` [E], `attention` of all queries, or in the last layer those of the
# ends, to the keys of all [M or E, heads, d], and the rows of the ends that the trained tokens read (`chosen`).
Rows = Padded | Packed


def rows_of(rollouts: Sequence[Text], packed: bool, device: torch.device) -> Rows:
    """A batch's rollouts as rows, each without its last token, which predicts nothing."""
    if packed:
        return Packed(pack(rollouts), device)
    read = [[len(r.prompt_ids) + i - 1 for i in r.trained_index] for r in rollouts]
    return Padded.of([(r.prompt_ids + r.response_ids)[:-1] for r in rollouts], read, device)


def fits(lm: LanguageModel) -> bool:
    """Whether the layers written out may stand for the model's own pass as things are now."""
    return lm.reads and lm.forward is None and not torch.is_autocast_enabled(lm.device.type)


def states(lm: LanguageModel, rows: Rows, kept: list[tuple[Tensor, Tensor]] | None = None) -> Float[Tensor, "n H"]:
    """Last hidden states that predict the trained tokens, in the order of the rollouts.

    `kept` takes the keys and values of every layer, [M, G, d].
    """
    base = lm.model.base_model
    with lm.switched():
        x = base.embed_tokens(rows.ids)
        eps = torch.tensor(base.norm.variance_epsilon, dtype=x.dtype, device=x.device)
        table = angles(base.rotary_emb, x.detach(), int(rows.positions.max()) + 1)
        turns = table.index_select(0, rows.positions)[:, :, None]
        for layer in base.layers:
            run = partial(_layer, layer, rows=rows, turns=turns, eps=eps, last=layer is base.layers[-1], kept=kept)
            recompute = layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)
            x = layer._gradient_checkpointing_func(run, x) if recompute else run(x)
        x = rms_norm(x, base.norm.weight, eps)
    return lm.extend(rows.chosen(x))


def _layer(
    layer: Any, x: Float[Tensor, "M D"], *, rows: Rows, turns: Float[Tensor, "M 2 1 d"], eps: Tensor, last: bool,
    kept: list[tuple[Tensor, Tensor]] | None,
) -> Float[Tensor, "q D"]:  # fmt: skip
    attention = layer.self_attn
    seen = rms_norm(x, layer.input_layernorm.weight, eps)
    asked, where = seen, turns
    if last:
        x, asked, where = (t.index_select(0, rows.ends) for t in (x, seen, turns))
    query, key, value = (
        project(t).unflatten(1, (-1, attention.head_dim))
        for project, t in ((attention.q_proj, asked), (attention.k_proj, seen), (attention.v_proj, seen))
    )
    if "q_norm" in attention._modules:
        query, key = rms_norm(query, attention.q_norm.weight, eps), rms_norm(key, attention.k_norm.weight, eps)
    query, key = turn(query, where[:, 0], where[:, 1]), turn(key, turns[:, 0], turns[:, 1])
    if kept is not None:
        kept.append((key, value))
    x = x + attention.o_proj(rows.attention(query, key, value, attention.scaling, last))
    found: Tensor = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm.weight, eps))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Which models


def readable(lm: LanguageModel, attentions: Sequence[str] = ("sdpa", NAME)) -> bool:
    """Whether a model is built as the layers written out are; `attentions` are transformers' names of theirs."""
    config = lm.config
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if getattr(config, "sliding_window", None) or config._attn_implementation not in attentions or not written_out(lm):
        return False
    if getattr(lm.model, "is_quantized", False):  # its kernels take the shapes that transformers gives them
        return False
    dropout = float(getattr(config, "attention_dropout", None) or 0.0)
    return lm.model.dtype in (torch.float32, torch.float64) and not dropout and config.vocab_size >= 8


@torch.no_grad()
def agrees(lm: LanguageModel) -> bool:
    """Whether the layers written out read padded and packed rows as the model's own pass reads single ones."""
    if not readable(lm):
        return False
    single = [torch.tensor([[*t.prompt_ids, *t.response_ids[:-1]]], device=lm.device) for t in TRIAL]
    own = [lm.hidden(ids)[0, len(t.prompt_ids) - 1 :] for ids, t in zip(single, TRIAL, strict=True)]
    expected = torch.cat(own)
    close = 1e-4 * expected.abs().max()
    found = [states(lm, rows_of(TRIAL, packed, lm.device)) for packed in ([False, True] if lm.packs else [False])]
    return all(bool((f - expected).abs().max() <= close) for f in found)
