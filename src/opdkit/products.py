"""Matrix products of few rows, as decoding makes them.

Axes: n rows, k columns, v outputs. Left out: products with many rows, for which torch's own are as fast as any here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FEW = 8  # rows
LEAST = 2**17  # entries of a weight for which turning the product pays: below, the time is that of the calls


def linear(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"], bias: Tensor | None = None) -> Float[Tensor, "n v"]:
    """x weight^T + bias. Up to FEW rows on a CPU are formed as weight x^T where the weight is large.

    The BLAS library divides a product among threads by the rows of its result. It reads a large weight once for each of 2
    or 3 rows of x: there the turned product takes a third to a ninth of the time, for 8 rows two thirds (measured with
    MKL, two threads). One row goes as two, because matrix x vector stays on one thread.
    """
    rows = x.shape[0]
    if not few(x, weight):
        return F.linear(x, weight, bias)
    columns = (torch.cat([x, x]) if rows == 1 else x).T
    found = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return found[:, :rows].T.contiguous()


def few(x: Float[Tensor, "n k"], weight: Float[Tensor, "v k"]) -> bool:
    """Whether `linear` turns the product round."""
    fits = 0 < x.shape[0] <= FEW and weight.numel() >= LEAST
    return fits and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
