"""Turns: how far student and teacher are apart in every turn of a response, and how much a turn then still counts.

A turn is one block of trained tokens: what the model wrote up to a tool's output, or after it (`Layout.turn`). Only tokens on
which the views gave numbers count; a turn without any has divergence 0 and weight 1, and no other turn is compared with it.

Left out: weights that need to know which tool call failed (the ablations of 2605.07725: fixed decay, and zero, after the
first error). An error shows as a divergence.

Axes: N trained tokens, M turns, S sequences.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opdkit.errors import MethodError
from opdkit.pieces import Piece, flat, piece
from opdkit.signals import log_ratio
from opdkit.step import Step

LOG_RATIO = log_ratio()


def _check_gap(of: Piece) -> None:
    flat(of, "turn_gap")


def _check_weight(of: Piece, cap: float | None, eps: float, floor: float, form: str) -> None:
    flat(of, "turn_weight")
    if cap is not None and cap < 1:
        raise MethodError(f"turn_weight(cap={cap}): expected at least 1, the weight of the first turn; None is no cap")
    if eps <= 0 or floor < 0:
        raise MethodError(f"turn_weight(eps={eps}, floor={floor}): expected eps above 0 and a floor of 0 nats or more")


@piece(check=_check_gap)
def turn_gap(step: Step, *, of: Piece = LOG_RATIO) -> Float[Tensor, " N"]:
    """d_k: the mean of |of| over the turn of each token, in nats/token (2605.07725 Eq. 6)."""
    signal = of(step)
    return turn_means(step, signal.abs(), usable(step, of)).of_each[step.layout.turn].to(signal.dtype)


@piece(check=_check_weight)
def turn_weight(
    step: Step,
    *,
    of: Piece = LOG_RATIO,
    cap: float | None = 1.2,
    eps: float = 1e-6,
    floor: float = 0.0,
    form: Literal["ratio", "product"] = "ratio",
) -> Float[Tensor, " N"]:
    """w_k = min((d_1 + eps) / (d_k + eps), cap), w_1 = 1: less where a turn diverges more than the first (2605.07725 Eq. 7).

    d_k is `turn_gap(of=of)` in nats/token. The cap acts on the result only, so it does not stick. `form` "product" is the
    released running product of (d_u + eps) / (d_(u+1) + eps), which telescopes: the same up to rounding. Where d_1 is near 0
    (a first turn that the student copies) every later turn would weigh next to nothing: `floor` is the least d_1, 0 in the
    paper. With no cap in effect the mean of w_k |of| over a turn is at most d_1 + eps. Never 0, so no token leaves the count.
    """
    signal = of(step)
    means = turn_means(step, signal.abs(), usable(step, of))
    first = means.first == torch.arange(means.first.shape[0], device=signal.device)
    d = torch.where(first, means.of_each.clamp(min=floor), means.of_each) + eps
    w = d[means.first] / d if form == "ratio" else _running(d, means)
    w = w if cap is None else w.clamp(max=cap)
    return w.masked_fill(first | ~means.known, 1.0)[step.layout.turn].to(signal.dtype)


def _check_gate(of: Piece, low: float, high: float, slope: float) -> None:
    flat(of, "outcome_gate")
    if not 0 <= low < high:
        raise MethodError(f"outcome_gate(low={low}, high={high}): expected 0 <= low < high")


@piece(check=_check_gate)
def outcome_gate(
    step: Step, *, of: Piece, low: float = 0.0, high: float = 0.1, slope: float = 1.0
) -> Float[Tensor, " N"]:
    """low + (high - low) sigmoid(- slope x mean of `of` over the sequence): more where a response did worse.

    `of` is the outcome's advantage. 2605.07725's code has it beside the paper's weight ("gated"); defaults: its script's.
    """
    mean = step.layout.spread(step.layout.seq_mean(of(step)))
    return low + (high - low) * torch.sigmoid(-slope * mean)


def _check_share(of: Piece, low: float | None, high: float | None) -> None:
    flat(of, "within")
    if (low is None and high is None) or (low is not None and high is not None and low > high):
        raise MethodError(f"within(low={low}, high={high}): expected at least one bound, and low up to high")


@piece(check=_check_share)
def within(step: Step, *, of: Piece, low: float | None = None, high: float | None = None) -> Float[Tensor, " N"]:
    """1 where low <= of <= high, else 0: a watched share of the tokens, or a weight. None is no bound."""
    value = of(step)
    inside = torch.ones_like(value, dtype=torch.bool) if low is None else value >= low
    return (inside if high is None else inside & (value <= high)).to(value.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Means over turns


@dataclass(frozen=True)
class TurnMeans:
    """A number for every turn of the step, in float64."""

    of_each: Float[Tensor, " M"]
    known: Bool[Tensor, " M"]  # whether any of its tokens counted
    place: Int[Tensor, " M"]  # of the turn in its sequence, from 0
    first: Int[Tensor, " M"]  # its sequence's first known turn; itself where none is known


def usable(step: Step, of: Piece) -> Bool[Tensor, " N"] | None:
    """The tokens on which the views that `of` reads gave numbers; None = every token."""
    return step.usable({need.split(".")[0] for _, need in of.needs})


def turn_means(step: Step, values: Float[Tensor, " N"], counted: Bool[Tensor, " N"] | None) -> TurnMeans:
    """The means of `values` over each turn's counted tokens; None = all count."""
    turn, seq, sequences = step.layout.turn, step.layout.seq, step.layout.sequences
    turns = int(turn.max()) + 1 if turn.numel() else 0
    there = torch.ones_like(values, dtype=torch.float64) if counted is None else counted.double()
    total, count = (there.new_zeros(turns).index_add(0, turn, x) for x in (values.double() * there, there))
    known, number = count > 0, torch.arange(turns, device=turn.device)
    owner = torch.zeros_like(number).scatter(0, turn, seq)
    start, first = (
        torch.full((sequences,), turns, device=turn.device).scatter_reduce(0, owner, x, "amin")[owner]
        for x in (number, number.masked_fill(~known, turns))
    )
    return TurnMeans(total / count.clamp(min=1), known, number - start, torch.where(first < turns, first, number))


def _running(d: Float[Tensor, " M"], means: TurnMeans) -> Float[Tensor, " M"]:
    """The product of d_u / d_(u+1) over the known turns of the sequence up to each of them."""
    w = torch.ones_like(d)
    for first in means.first[means.known].unique():
        own = torch.nonzero(means.known & (means.first == first)).squeeze(1)
        w[own[1:]] = (d[own[:-1]] / d[own[1:]]).cumprod(0)
    return w
