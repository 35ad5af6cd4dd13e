"""KL divergences over the whole vocabulary: value and logit gradient of a row in one kernel, for CUDA devices.

Axes: n rows, V vocabulary. z, t: logits of student and teacher, normalised or not; p, q their softmax.

    reverse: value = sum p (z - t) - (lse z - lse t)      gradient = p ((z - t) - sum p (z - t))
    forward: value = sum q (t - z) + (lse z - lse t)      gradient = p - q

The first sweep over a row finds both log-sum-exps and the sum, with running maxima (1805.02867); the second writes the
gradient over the student's logits. So z and t are read twice and z is written once; torch's operations (`opdkit.head`)
pass over them about ten times. Everything is float32, and equal logits give exactly 0. TRITON_INTERPRET=1 runs it on a
CPU, for tests. Left out: what `opdkit.kernels` lists.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096  # ids at a time: two rows of them stay in a program's registers


@triton.jit
@no_type_check
def _kl_rows(z, t, coef, value, z_stride, t_stride, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    lanes = tl.arange(0, BLOCK)
    low = -1.0e30  # behind the last id, in both: no mass, and no gap
    z_max = low
    t_max = low
    z_sum = 0.0  # of exp(z - z_max)
    t_sum = 0.0  # of exp(t - t_max)
    mean = 0.0  # the sum of one of these x gap, divided at the end
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        zs = tl.load(z + start + lanes, mask=inside, other=low)
        ts = tl.load(t + start + lanes, mask=inside, other=low)
        gap = zs - ts
        z_new = tl.maximum(z_max, tl.max(zs, 0))
        t_new = tl.maximum(t_max, tl.max(ts, 0))
        p = tl.exp(zs - z_new)
        q = tl.exp(ts - t_new)
        z_fade = tl.exp(z_max - z_new)
        t_fade = tl.exp(t_max - t_new)
        if REVERSE:  # noqa: SIM108 (a constant: one branch is compiled)
            mean = mean * z_fade + tl.sum(p * gap, 0)
        else:
            mean = mean * t_fade + tl.sum(q * gap, 0)
        z_sum = z_sum * z_fade + tl.sum(p, 0)
        t_sum = t_sum * t_fade + tl.sum(q, 0)
        z_max = z_new
        t_max = t_new
    shift = (z_max - t_max) + (tl.log(z_sum) - tl.log(t_sum))  # lse z - lse t
    factor = tl.load(coef + row)
    if REVERSE:
        mean = mean / z_sum
        tl.store(value + row, mean - shift)
    else:
        mean = mean / t_sum
        tl.store(value + row, shift - mean)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        zs = tl.load(z + start + lanes, mask=inside, other=low)
        ts = tl.load(t + start + lanes, mask=inside, other=low)
        p = tl.exp(zs - z_max) / z_sum
        if REVERSE:  # noqa: SIM108
            gradient = p * ((zs - ts) - mean)
        else:
            gradient = p - tl.exp(ts - t_max) / t_sum
        tl.store(z + start + lanes, factor * gradient, mask=inside)


def kl_rows(
    z: Float[Tensor, "n V"], t: Float[Tensor, "n V"], coef: Float[Tensor, " n"], *, reverse: bool, block: int = BLOCK
) -> Float[Tensor, " n"]:
    """KL(p, q), with `reverse`, or KL(q, p) of every row, in nats; coef x its gradient is written over z.

    Rows of z and t must be contiguous; float32.
    """
    assert z.dtype == t.dtype == coef.dtype == torch.float32 and z.shape == t.shape and z.stride(1) == t.stride(1) == 1
    value, coef = z.new_empty(z.shape[0]), coef.contiguous()
    if z.shape[0]:
        block = min(block, triton.next_power_of_2(z.shape[1]))
        warps = max(1, min(16, block // 256))
        _kl_rows[(z.shape[0],)](
            z, t, coef, value, z.stride(0), t.stride(0), z.shape[1], reverse, block, num_warps=warps
        )
    return value
