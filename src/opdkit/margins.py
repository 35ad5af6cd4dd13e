"""Order consistency and margins: what the verifier's verdicts say about a token reward's ranking (2605.03677, Uni-OPD).

The distillation return G of a response is the mean of its token rewards (nats/token). With S+ and S- the correct and the
incorrect responses to one prompt, the margin is m = mean over S+ of G - mean over S- of G, or, with mode minmax,
min over S+ - max over S-. A prompt whose m is below delta is calibrated: its rewards are shifted, or responses leave it.

G is over the trained tokens with a usable reward, of the responses that are there: those that a prepare step dropped, and
failed teacher scores, do not count (in the released code they do, with reward 0). Left out: a scope over several processes;
with scope batch each process compares its own responses.

Axes: N trained tokens, S sequences.
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
from opdkit.turns import usable

Mode = Literal["mean", "minmax"]
Scope = Literal["group", "batch"]
Direction = Literal["both", "up", "down"]


def _flat(of: Piece, **_: object) -> None:
    flat(of, "a margin")


@piece(check=_flat)
def distillation_return(step: Step, *, of: Piece) -> Float[Tensor, " N"]:
    """G of every token's response: the mean of the token rewards `of` over its usable tokens, in nats/token."""
    found = returns(step, of)
    return step.layout.spread(found.of_each.to(found.reward.dtype))


@piece("rollouts.correct", "rollouts.{scope}", check=_flat)
def margin_shift(
    step: Step,
    *,
    of: Piece,
    delta: float = 0.4,
    direction: Direction = "both",
    mode: Mode = "mean",
    scope: Scope = "group",
) -> Float[Tensor, " N"]:
    """Token rewards `of` moved by a constant for each response, so that the margin of every mixed prompt is at least delta.

    With m < delta and gap = delta - m: up adds gap to the tokens of correct responses, down takes it from incorrect ones,
    both does half of each. In mode mean the new margin is delta. Prompts with m >= delta or with one side only are left as
    they are, to the bit. Default: the main experiments' (nats/token).
    """
    found = returns(step, of)
    reward, shift = found.reward, torch.zeros_like(found.of_each)
    for right, wrong in sides(step, found.counted, scope):
        gap = delta - margin(found.of_each[right], found.of_each[wrong], mode)
        if gap > 0:
            shift[right] += {"up": gap, "down": 0.0, "both": gap / 2}[direction]
            shift[wrong] -= {"up": 0.0, "down": gap, "both": gap / 2}[direction]
    moved = reward + step.layout.spread(shift).to(reward.dtype)
    return torch.where((shift != 0)[step.layout.seq], moved, reward)  # -0.0 + 0.0 would be another number


def _check_mask(of: Piece, delta: float, keep: float, mode: str, scope: str) -> None:
    flat(of, "a margin")
    if not 0 <= keep <= 1:
        raise MethodError(f"margin_mask(keep={keep}): expected the share of each side that stays, from 0 to 1")


@piece("rollouts.correct", "rollouts.{scope}", check=_check_mask)
def margin_mask(
    step: Step, *, of: Piece, delta: float = 0.4, keep: float = 0.25, mode: Mode = "mean", scope: Scope = "group"
) -> Float[Tensor, " N"]:
    """0 on the tokens of responses that leave their prompt until its margin is delta, 1 on all others.

    While m < delta, the correct response with the least G or the incorrect one with the largest leaves, whichever raises m
    more (the correct one where both raise it equally); never below max(1, int(keep x size)) of a side, and not where
    neither raises m. `keep`: the released default.
    """
    found = returns(step, of)
    stays = torch.ones_like(found.of_each)
    for right, wrong in sides(step, found.counted, scope):
        stays[remove(found.of_each, right, wrong, delta, keep, mode)] = 0.0
    return step.layout.spread(stays.to(found.reward.dtype))


@piece("rollouts.correct", "rollouts.{scope}", check=_flat)
def below_margin(
    step: Step, *, of: Piece, delta: float = 0.0, mode: Mode = "minmax", scope: Scope = "group"
) -> Float[Tensor, " N"]:
    """1 on the tokens of mixed prompts whose margin is below delta, else 0. The defaults: order consistency is violated."""
    found = returns(step, of)
    below = torch.zeros_like(found.of_each)
    for right, wrong in sides(step, found.counted, scope):
        if margin(found.of_each[right], found.of_each[wrong], mode) < delta:
            below[torch.cat([right, wrong])] = 1.0
    return step.layout.spread(below.to(found.reward.dtype))


def _check_limit(num: str, den: str, limit: float) -> None:
    if not limit > 0:
        raise MethodError(
            f"within_log_ratio(limit={limit}): expected a number of nats above 0, else every token is left out"
        )


@piece("{num}.sampled", "{den}.sampled", check=_check_limit)
def within_log_ratio(
    step: Step, *, num: str = "teacher", den: str = "student", limit: float = 10.0
) -> Float[Tensor, " N"]:
    """1 where |log num - log den| of the sampled token is below `limit` nats, else 0: the token leaves the count.

    `den` is the student before the update (the released code compares with the one that is being updated and leaves such
    tokens in the denominator). Default 10: the released scripts.
    """
    ratio = log_ratio(num=num, den=den)(step)
    return (ratio.abs() < limit).to(ratio.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Returns, sides, margins


@dataclass(frozen=True)
class Returns:
    """G of every response, and whether it has any usable token (else G is 0 and it stands on neither side)."""

    reward: Float[Tensor, " N"]  # of the tokens, as it was given
    of_each: Float[Tensor, " S"]  # float64
    counted: Bool[Tensor, " S"]


def returns(step: Step, of: Piece) -> Returns:
    """The mean of a token reward over each response's tokens on which the views that it reads gave numbers."""
    reward, layout, known = of(step), step.layout, usable(step, of)
    there = torch.ones_like(reward, dtype=torch.float64) if known is None else known.double()
    count = layout.seq_sum(there)
    return Returns(reward, layout.seq_sum(reward.double() * there) / count.clamp(min=1), count > 0)


def sides(step: Step, counted: Bool[Tensor, " S"], scope: Scope) -> list[tuple[Int[Tensor, " c"], Int[Tensor, " i"]]]:
    """(correct, incorrect) responses of every prompt that has both; with scope batch those of the whole step."""
    assert step.correct is not None
    group = step.layout.group if scope == "group" else torch.zeros_like(step.layout.group)
    found = []
    for number in group.unique().tolist():
        own = counted & (group == number)
        right, wrong = (torch.nonzero(own & side).squeeze(1) for side in (step.correct, ~step.correct))
        if right.numel() and wrong.numel():
            found.append((right, wrong))
    return found


def margin(right: Float[Tensor, " c"], wrong: Float[Tensor, " i"], mode: Mode) -> float:
    """m of the returns of correct and incorrect responses, in nats/token."""
    return float(right.mean() - wrong.mean()) if mode == "mean" else float(right.min() - wrong.max())


def remove(
    g: Float[Tensor, " S"], right: Int[Tensor, " c"], wrong: Int[Tensor, " i"], delta: float, keep: float, mode: Mode
) -> list[int]:
    """The responses that leave, in the order in which they do (card (d) 6: greedy)."""
    left = sorted(right.tolist(), key=lambda s: float(g[s]))
    other = sorted(wrong.tolist(), key=lambda s: -float(g[s]))
    least = [max(1, int(keep * len(side))) for side in (left, other)]
    gone: list[int] = []
    now = margin(g[left], g[other], mode)
    while now < delta:
        options = [(left[1:], other)] if len(left) > least[0] else []
        options += [(left, other[1:])] if len(other) > least[1] else []
        reached = [margin(g[a], g[b], mode) for a, b in options]
        if not options or max(reached) <= now:
            break
        now = max(reached)
        after = options[reached.index(now)]
        gone.append(left[0] if len(after[0]) < len(left) else other[0])
        left, other = after
    return gone
