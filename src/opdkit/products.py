"""Matrix products on a CPU where torch's own leave time lying about: few rows, and processors that its library neglects.

Axes: m, n rows, k columns of x, v outputs. torch multiplies float32 with MKL, which knows the processors of Intel best. On
those of AMD few rows of a product go to one thread, and where AVX-512 has units of its full width (family 26, Zen 5) MKL
uses half of it; oneDNN, which torch carries for other types and uses for float32 in compiled graphs only, uses all of it.
Where AVX-512 goes through units of half the width (family 25, Zen 4) oneDNN gains on a few dozen rows only. Left out: other
types, devices and processors, where these are torch's products.
"""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW = 8  # rows
LEAST = 2**17  # entries of a weight for which turning the product pays: below, the time is that of the calls
WIDE_ROWS = 3  # from which oneDNN is at least as fast as a turned product
WIDE_PRODUCT = 2**22  # multiplications: a shape seen for the first time costs oneDNN 0.4 ms, every call 10 microseconds
WIDE_SUM = 2**24  # the same where the product is formed apart and then added
WIDE_OUTER = 2**25  # the same where the sum runs over many rows
OUTER_ENTRIES = 2**19  # of such a sum formed at a time before it is added: a larger one is no faster
SHAPES = 64  # that oneDNN keeps, half a megabyte of code each; its own default is 1,024. A step of a small model has 40
ROWS = 512  # of the largest piece in which oneDNN is given many rows; the others are its halves down to
LEAST_ROWS = 64  # ... and what is left at the end
FULL_WIDTH = 26  # AMD's family from which on AVX-512 has units of 512 bits
SOME = range(5, LEAST_ROWS + 1)  # rows of which oneDNN makes more than MKL and than a turned product, below that family


def linear(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"], bias: Tensor | None = None) -> Float[Tensor, "n v"]:
    """x weight^T + bias, differentiable in all three.

    Up to FEW rows on a processor of AMD are formed as weight x^T where the weight is large and the product not oneDNN's
    (`by_onednn`): MKL divides a product among threads by the rows of its result there. It reads a large weight once for
    each of 2 or 3 rows of x: there the turned product takes a third to a ninth of the time, for 8 rows two thirds (two
    threads). One row goes as two, because matrix x vector stays on one thread. On Intel's processors MKL is the faster one.
    """
    if by_onednn(x, weight.shape[0]):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return found
        return _by_rows(x, weight, bias)
    if not few(x, weight):
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    columns = (torch.cat([x, x]) if rows == 1 else x).T
    found = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return found[:, :rows].T.contiguous()


def differs(dtype: torch.dtype) -> bool:
    """Whether `linear` is anywhere another product than torch's for this type: asked once instead of at every call."""
    return (TURNS and dtype in (torch.float32, torch.float64)) or (prefers_onednn() and dtype == torch.float32)


def few(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"]) -> bool:
    """Whether `linear` turns the product round."""
    fits = TURNS and 0 < x.shape[0] <= FEW and weight.numel() >= LEAST and not by_onednn(x, weight.shape[0])
    return fits and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def times(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """a b, without a gradient."""
    return _by_rows(a, b.T) if by_onednn(a, b.shape[1]) else a @ b


def outer(a: Float[Tensor, "m n"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """a^T b, without a gradient."""
    if not wide(a.T, b.shape[1], WIDE_OUTER):
        return a.T @ b
    if a.shape[1] > b.shape[1] and a.is_contiguous():  # long rows are the faster ones
        return outer(b, a).T
    total = None
    for rows in pieces(a.shape[0]):
        found = _onednn(a[rows].T, b[rows].T)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def add_times(
    total: Float[Tensor, "m n"], a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], fresh: bool = False
) -> None:
    """total += a b, in place, without a gradient; `fresh`: total = a b, whatever was there."""
    if by_onednn(a, b.shape[1], WIDE_SUM):
        found = _by_rows(a, b.T)
        total.copy_(found) if fresh else total.add_(found)
    else:
        total.addmm_(a, b, beta=0 if fresh else 1)


def add_outer(total: Float[Tensor, "n k"], a: Float[Tensor, "m n"], b: Float[Tensor, "m k"]) -> None:
    """total += a^T b, in place, without a gradient; formed apart only where that is faster, and then in small parts."""
    columns = max(1, OUTER_ENTRIES // b.shape[1])
    if not wide(a[:, :columns].T, b.shape[1], WIDE_OUTER):
        total.addmm_(a.T, b)
        return
    for start in range(0, a.shape[1], columns):
        part = slice(start, start + columns)
        total[part] += outer(a[:, part], b)


def by_onednn(a: Float[Tensor, "m k"], n: int, least: int | None = None) -> bool:
    """Whether a product of `a` with n columns is oneDNN's, on whichever processor. (One that sums over many rows: `wide`.)"""
    return wide(a, n, least) or some(a, n)


def wide(a: Float[Tensor, "m k"], n: int, least: int | None = None) -> bool:
    """Whether a product of `a` with n columns is oneDNN's: float32, large enough, on a processor that gains by it."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or a.shape[0] < WIDE_ROWS:
        return False
    return a.shape[0] * a.shape[1] * n >= (WIDE_PRODUCT if least is None else least) and prefers_onednn()


def some(a: Float[Tensor, "m k"], n: int) -> bool:
    """Whether a product of `a` with n columns is oneDNN's on a processor where only a few dozen rows gain by it: with large
    matrices it has 1 to 2 times MKL's rate there."""
    fits = SPLIT and a.shape[0] in SOME and a.shape[1] * n >= LEAST
    return fits and a.dtype == torch.float32 and a.device.type == "cpu"


def pieces(n: int) -> Iterator[slice]:
    """Rows in pieces of few sizes, ROWS at most: oneDNN keeps what it made for every shape (SHAPES), which lies between
    freed blocks and keeps them in the process. Batches of different lengths would fill gigabytes."""
    start, size = 0, ROWS
    while start < n:
        while size > max(n - start, LEAST_ROWS):
            size //= 2
        yield slice(start, min(start + size, n))
        start += size


def rounded(rows: int) -> int:
    """As many rows or some more, so that batches of different lengths make products of few shapes."""
    return rows + (-rows % LEAST_ROWS if rows >= 256 and prefers_onednn() else 0)


def prefers_onednn() -> bool:
    """Whether float32 products are faster with oneDNN: MKL is torch's library, the processor AMD's with AVX-512 in full."""
    return NEGLECTED


def _by_rows(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"], bias: Tensor | None = None) -> Float[Tensor, "n v"]:
    if x.shape[0] <= LEAST_ROWS:
        return _onednn(x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for rows in pieces(x.shape[0]):
        out[rows] = _onednn(x[rows], weight, bias)
    return out


def _onednn(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"], bias: Tensor | None = None) -> Float[Tensor, "n v"]:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # other layouts are multiplied by loops
    if bias is not None:
        bias = bias.contiguous()  # another one is read as if it were
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class Linear(nn.Linear):
    """torch's linear layer with the products of this file."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type) or self.weight.dtype != torch.float32 or input.dim() < 2:
            return super().forward(input)
        return linear(input.flatten(0, -2), self.weight, self.bias).unflatten(0, input.shape[:-1])


def install(model: Any) -> None:
    """Let a model's plain linear layers multiply with `linear`, where that is another product than torch's."""
    if prefers_onednn():
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear


class _Linear(torch.autograd.Function):
    """`linear` by oneDNN, which has no gradient of its own."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _by_rows(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        return (
            times(grad, weight) if ctx.needs_input_grad[0] else None,
            outer(grad, x) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _family() -> int | None:
    """That of a processor of AMD; None for others. Linux says "cpu family : 25", Windows "AMD64 Family 25"."""
    cpuinfo = Path("/proc/cpuinfo")
    about = platform.processor() + (cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else "")
    family = re.search(r"family\s*:?\s*(\d+)", about, re.IGNORECASE)
    return (int(family[1]) if family else 0) if "AuthenticAMD" in about else None


def _onednn_knows_better() -> bool:
    """An AMD with AVX-512, and an oneDNN that works: torch calls it by a private name, so a small product is tried first."""
    with_mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not with_mkl or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if FAMILY is None:
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(SHAPES))  # read at the first product
    a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    return torch.equal(_onednn(a, b), a @ b.T)


FAMILY = _family()
TURNS = FAMILY is not None and torch.backends.mkl.is_available()
_KNOWS = _onednn_knows_better()  # asked once, before anybody plans with tensors that hold no numbers
NEGLECTED = _KNOWS and (FAMILY or 0) >= FULL_WIDTH
SPLIT = _KNOWS and not NEGLECTED
