"""The layers of Llama-like models written out for one new token per row: what transformers computes, in fewer operations.

Axes: r live rows, P prompts, G key-value heads, H query heads, m = H / G, d width of a head, t tokens so far, D hidden.

A forward pass of transformers spends most of a small model's time on the number of its operations. Here matrices that
read the same input are joined where the copy is small, rotary angles are looked up, query heads that share keys are
read as several queries, and rows of one group read the keys of their prompt as one product (`Part`). Under autocast the
weights are cast once for a whole sampling call. Used only for the classes of `layers`, without hooks, and only after a
trial in which the model's own forward pass gave the same (`make_body`); everything else decodes with transformers.
Left out: windows, rotary angles that depend on the length, mixtures of experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from opdkit.layers import angles, rms_norm, turn, written_out
from opdkit.models import LanguageModel
from opdkit.products import Linear, differs, linear
from opdkit.rollouts.cache import CACHE, BufferLayer, Part, make_cache, states_of

JOINED = 2**18  # entries: larger matrices are not copied to be joined; their products outweigh the calls
_trusted: WeakKeyDictionary[Any, dict[torch.dtype, bool]] = WeakKeyDictionary()  # model -> outcomes of its trials


@dataclass(frozen=True)
class _Layer:
    qkv: Callable[[Tensor], tuple[Tensor, ...]]  # one output, or where nothing is joined one of each matrix
    out: Callable[[Tensor], tuple[Tensor, ...]]
    gate_up: Callable[[Tensor], tuple[Tensor, ...]]
    down: Callable[[Tensor], tuple[Tensor, ...]]
    before: Tensor  # weights of the norms
    after: Tensor
    heads: Float[Tensor, "K d"] | None  # of the norm of each query and key head
    scale: float


class Body:
    """A model's layers as they are now; `length` is the largest number of tokens that a row will hold."""

    def __init__(self, lm: LanguageModel, length: int) -> None:
        base, config = lm.model.base_model, lm.config
        wide = torch.promote_types(base.norm.weight.dtype, torch.float32)
        self.embed, self.eps = base.embed_tokens, torch.tensor(base.norm.variance_epsilon, dtype=wide, device=lm.device)
        self.kv_heads, self.query_heads = config.num_key_value_heads, config.num_attention_heads
        self.width, self.norm, self.act = base.layers[0].self_attn.head_dim, base.norm.weight, base.layers[0].mlp.act_fn
        device = lm.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.norm.dtype
        self.layers = [self._layer(layer) for layer in base.layers]
        self.angles = angles(base.rotary_emb, self.norm, length)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if "q_norm" in attention._modules:
            counts = (self.query_heads, attention.q_norm), (self.kv_heads, attention.k_norm)
            norms = torch.cat([norm.weight.expand(n, -1) for n, norm in counts])
        return _Layer(
            joined((attention.q_proj, attention.k_proj, attention.v_proj), self.dtype),
            joined((attention.o_proj,), self.dtype),
            joined((mlp.gate_proj, mlp.up_proj), self.dtype),
            joined((mlp.down_proj,), self.dtype),
            layer.input_layernorm.weight, layer.post_attention_layernorm.weight, norms, attention.scaling,
        )  # fmt: skip

    def __call__(
        self, tokens: Int[Tensor, " r"], positions: Int[Tensor, " r"], parts: Sequence[Part]
    ) -> Float[Tensor, "r D"]:
        """Last hidden states after one more token per row; its keys are added to the parts, whose rows are in order."""
        x = self.embed(tokens)
        by_row = self.angles.index_select(0, positions)[:, :, None]
        cos, sin = by_row[:, 0], by_row[:, 1]
        rows, turning = tokens.shape[0], self.query_heads + self.kv_heads
        for i, layer in enumerate(self.layers):
            found = layer.qkv(rms_norm(x, layer.before, self.eps))
            heads = (found[0] if len(found) == 1 else torch.cat(found, -1)).view(rows, -1, self.width)
            turned = heads[:, :turning]
            if layer.heads is not None:
                turned = rms_norm(turned, layer.heads, self.eps)
            turned = turn(turned, cos, sin).to(self.dtype)
            query = turned[:, : self.query_heads].view(rows, self.kv_heads, -1, self.width)
            key, value = turned[:, self.query_heads :], heads[:, turning:]
            x = x + layer.out(attended(parts, i, query, key, value, layer.scale))[0]
            found = layer.gate_up(rms_norm(x, layer.after, self.eps))
            gate, up = found if len(found) == 2 else found[0].chunk(2, -1)
            x = x + layer.down(self.act(gate).mul_(up))[0]
        return rms_norm(x, self.norm, self.eps)


def attended(
    parts: Sequence[Part], layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Float[Tensor, "r HD"]:
    """What every row's query reads in its part, to which the row's key and value are added."""
    if len(parts) == 1:
        return parts[0].attend(layer, query, key, value, scale)
    found, at = [], 0
    for part in parts:
        its = slice(at, at + part.rows)
        found.append(part.attend(layer, query[its], key[its], value[its], scale))
        at += part.rows
    return torch.cat(found)


def joined(modules: Sequence[Any], dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that applies linear layers to one input: small ones as one matrix, modules of other classes as they are."""
    if not all(type(m) in (nn.Linear, Linear) for m in modules):
        return lambda x: tuple(m(x) for m in modules)
    given: list[tuple[Tensor, Tensor | None]] = [(m.weight, m.bias) for m in modules]
    if len(given) > 1 and sum(w.numel() for w, _ in given) <= JOINED:
        biases = [w.new_zeros(w.shape[0]) if b is None else b for w, b in given]
        plain = all(b is None for _, b in given)
        given = [(torch.cat([w for w, _ in given]), None if plain else torch.cat(biases))]
    cast = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in given]
    product = linear if differs(dtype) else F.linear
    if len(cast) == 1:
        weight, bias = cast[0]
        return lambda x: (product(x.to(dtype), weight, bias),)
    return lambda x: tuple(product(x.to(dtype), w, b) for w, b in cast)


# ---------------------------------------------------------------------------------------------------------------------
# Which models


@torch.no_grad()
def make_body(lm: LanguageModel, length: int) -> Body | None:
    """The model's body for rows of up to `length` tokens; None where only transformers' forward pass will do."""
    if not written_out(lm):
        return None
    if any(type(layer) is not BufferLayer for layer in make_cache(lm.model.config).layers):
        return None
    with lm.switched():
        body = Body(lm, length)
        outcomes = _trusted.setdefault(lm.model, {})
        if body.dtype not in outcomes:
            outcomes[body.dtype] = agrees(lm)
    return body if outcomes[body.dtype] else None


def agrees(lm: LanguageModel) -> bool:
    """Whether the body decodes as the model's own forward pass does: two prompts, three tokens, with and without groups."""
    prompts, new = (
        torch.tensor([[1, 2, 3, 2], [3, 3, 1, 0]]) % lm.vocab,
        torch.tensor([[2, 1, 1], [1, 3, 0]]) % lm.vocab,
    )
    prompts, new = prompts.to(lm.device), new.to(lm.device)
    whole = torch.cat([prompts, new], 1)
    expected = lm.run(input_ids=whole, use_cache=False).last_hidden_state[:, prompts.shape[1] :]
    body = Body(lm, whole.shape[1])
    close = 1e-4 if body.dtype in (torch.float32, torch.float64) else 5e-2
    for owner in ([0, 1], [0, 0, 1]):
        cache, rows = make_cache(lm.model.config), torch.tensor(owner, device=lm.device)
        lm.run(input_ids=prompts, use_cache=True, **{CACHE: cache})
        part = Part(states_of(cache), rows, None, body.dtype, shared=len(owner) > 2)
        for t in range(new.shape[1]):
            found = body(new[rows, t], rows.new_full(rows.shape, prompts.shape[1] + t), [part])
            if not (found - expected[rows, t]).abs().max() <= close * expected.abs().max():
                return False
    return True
