"""From losses of tokens to the loss of an update: named means over all its tokens, or over all its sequences.

Axes: N trained tokens, S sequences. The denominators belong to the whole update, whatever its micro-batches and however
many processes share it. So a mean is two steps: `units` counts what this process holds, `reduction` divides by the sum.
"""

from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from opdkit.step import Layout

Reduction = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]


def units(name: Reduction, layout: Layout, counted: Bool[Tensor, " N"]) -> int:
    """What a named mean averages over: counted tokens for `token_mean`, else sequences with a counted token."""
    if name == "token_mean":
        return int(counted.sum())
    return int((layout.seq_sum(counted.double()) > 0).sum())


def reduction(
    name: Reduction, layout: Layout, counted: Bool[Tensor, " N"], horizon: int, total: int | None = None
) -> Float[Tensor, " N"]:
    """The coefficient of every token under a named mean; `counted` tokens have a non-zero weight.

    token_mean: 1 / counted tokens. seq_mean_*: every sequence with a counted token has the same weight, its tokens are
    averaged (token_mean), summed (token_sum), or summed and divided by the horizon in tokens (token_sum_norm).
    `total` is the sum of `units` over all processes; None = this layout is the whole update. Raises ValueError for an
    unknown name, and when a norm by the horizon has none.
    """
    if name not in get_args(Reduction):
        raise ValueError(f"reduction is {name!r}; expected one of {', '.join(get_args(Reduction))}")
    share = counted.double() / max(1, units(name, layout, counted) if total is None else total)
    if name == "seq_mean_token_mean":
        return share / layout.spread(layout.seq_sum(counted.double())).clamp(min=1)
    if name == "seq_mean_token_sum_norm":
        if horizon <= 0:
            raise ValueError("reduction seq_mean_token_sum_norm divides by the response limit, but the step has none")
        return share / horizon
    return share
