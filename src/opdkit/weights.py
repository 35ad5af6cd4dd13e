"""Weights: how much each token counts. Pure functions Step -> [N], never negative.

A weight of 0 removes the token from its term's count; a small weight does not.
"""

from math import inf, log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.errors import MethodError
from opdkit.pieces import piece
from opdkit.step import Step


@piece()
def ones(step: Step) -> Float[Tensor, " N"]:
    """Every trained token counts the same."""
    return (
        torch.ones_like(step.views["student"].sampled) if "student" in step.views else torch.ones(step.tokens.shape[0])
    )


@piece()
def first_tokens(step: Step, *, n: int) -> Float[Tensor, " N"]:
    """1 for the first n trained tokens of each sequence, 0 after them."""
    return (step.layout.position() < n).to(torch.float32)


@piece("{teacher}.sampled")
def confidence(step: Step, *, teacher: str = "teacher") -> Float[Tensor, " N"]:
    """The teacher's probability of the sampled token."""
    return step.views[teacher].sampled.exp()


def _check_importance(num: str, den: str, level: str, cap: float | None, floor: float | None, how: str) -> None:
    if num == den:
        raise MethodError(f"importance(num={num!r}, den={den!r}): the ratio of a policy to itself is 1; name two views")
    if (cap is not None and cap <= 0) or (floor is not None and not 0 < floor < (inf if cap is None else cap)):
        raise MethodError(f"importance(floor={floor}, cap={cap}): expected 0 < floor < cap; None is no bound")
    if how == "mask" and cap is None and floor is None:
        raise MethodError("importance(how='mask') masks outside [floor, cap]; give at least one of them")


@piece("{num}.sampled", "{den}.sampled", check=_check_importance)
def importance(
    step: Step,
    *,
    num: str = "student",
    den: str = "behaviour",
    level: Literal["token", "sequence", "geometric"] = "token",
    cap: float | None = 2.0,
    floor: float | None = None,
    how: Literal["truncate", "mask"] = "truncate",
) -> Float[Tensor, " N"]:
    """w = num(y) / den(y), detached: makes a mean over samples of `den` one over samples of `num`.

    level: the token's own ratio; the product over its sequence; or that product's geometric mean per token.
    how: truncate limits w to [floor, cap]; mask keeps w in [floor, cap] and gives 0 elsewhere, and a masked token leaves
    the count. None is no bound. The product without a bound is unbiased; the others trade bias for variance.
    """
    gap = step.views[num].sampled - step.views[den].sampled
    layout = step.layout
    if level != "token":
        gap = layout.spread(layout.seq_sum(gap) if level == "sequence" else layout.seq_mean(gap))
    # A ratio that underflows stays above 0: only a mask takes a token out of the count.
    bottom = log(torch.finfo(gap.dtype).tiny) if floor is None else log(floor)
    limited = gap.clamp(min=bottom, max=None if cap is None else log(cap))
    if how == "truncate":
        return limited.exp()
    outside = gap != limited if floor is not None else gap > limited
    return limited.exp().masked_fill(outside, 0.0)
