"""Pieces of Llama-like layers written out: the norm and the rotation of heads with hand-written gradients, and attention.

Axes: M tokens, K heads, d width of a head, D hidden; B rows of q queries that read t tokens, b = B K.

transformers writes both as chains of elementwise operations, each of which autograd records and reads back. Here each is
a handful of passes forward and backward. `written_out` says for which models they may stand in.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

SHORT = 64  # tokens of a row up to which attention is formed by batched products
KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")

_tables: WeakKeyDictionary[Any, dict[tuple[torch.dtype, torch.device], Tensor]] = WeakKeyDictionary()


def written_out(lm: Any) -> bool:
    """Whether a model's class is one of KNOWN, its parts are transformers' own, and nothing watches or divides them."""
    base = lm.model.base_model
    if lm.forward is not None or type(base).__name__ not in KNOWN or not base.__module__.startswith("transformers."):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in base.modules()):
        return False  # sharded, placed on several devices, or watched
    return base.rotary_emb.rope_type not in ("dynamic", "longrope")


def rms_norm(x: Float[Tensor, "*rows D"], weight: Float[Tensor, "*K D"], eps: Tensor) -> Float[Tensor, "*rows D"]:
    """x / root mean square x weight over the last axis, with the mean in float32 as transformers has it."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        found: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return found
    return _weighted(x, weight, _scale(x, eps))


def _weighted(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    found = (x * scale).to(x.dtype)
    return found.mul_(weight) if weight.dtype == x.dtype else found * weight


def _scale(x: Tensor, eps: Tensor) -> Tensor:
    """1 / root mean square of the rows [*rows, 1]; `eps` is a scalar tensor of the dtype to sum in."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)  # F.rms_norm takes twice as long here
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _Norm(torch.autograd.Function):
    """`rms_norm` of rows whose weight is a vector [D]."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return _weighted(x, weight, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        product, factor = (grad * x).reshape(-1, size), scale.reshape(-1)
        lean = (product @ weight) * factor.pow(3) / size  # both sums over an axis are matrix x vector products
        found = (grad * weight).mul_(scale).addcmul_(x, lean.view_as(scale), value=-1)
        return found, factor @ product, None


@torch.no_grad()
def angles(rotary: Any, like: Tensor, length: int) -> Float[Tensor, "C 2 d"]:
    """cos and signed sin of every position below `length` and perhaps of some more, for `turn`.

    They are the same at every step, so a module's table is kept, in the type and on the device of `like`.
    """
    tables = _tables.setdefault(rotary, {})
    key = (like.dtype, like.device)
    if key not in tables or tables[key].shape[0] < length:
        some_more = length + length // 2
        with torch.inference_mode(False):  # else no pass with a gradient could read it
            positions = torch.arange(some_more, device=like.device)[None]
            cos, sin = rotary(like.new_empty(1), positions)
            low, high = sin[0].chunk(2, -1)
            tables[key] = torch.stack([cos[0], torch.cat([-low, high], -1)], 1)
    return tables[key]


def turn(x: Float[Tensor, "M K d"], cos: Float[Tensor, "M 1 d"], sin: Float[Tensor, "M 1 d"]) -> Float[Tensor, "M K d"]:
    """Heads turned by their position's angle (`angles`)."""
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Turn.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return found
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1)), None, None


def batched_attention(
    q: Float[Tensor, "B K q d"], k: Float[Tensor, "B K t d"], v: Float[Tensor, "B K t d"],
    bias: Float[Tensor, "b q t"] | None, scale: float,
) -> Float[Tensor, "B K q d"]:  # fmt: skip
    """softmax(scale q k^T + bias) v by batched products: up to SHORT tokens torch's fused kernel is the slower one."""
    none = q.new_empty(1, 1, 1) if bias is None else bias
    scores = torch.baddbmm(
        none, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=int(bias is not None), alpha=scale
    )
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
