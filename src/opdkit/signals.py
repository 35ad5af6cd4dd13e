"""Signals: what is rewarded at every token. Pure functions Step -> [N] or [N, K], detached, in nats.

Axes: N trained tokens, K support size, S sequences. "student" is the policy that sampled, before the update.
"""

from collections.abc import Callable
from math import log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.divergences import Kind, divergence, on_support
from opdkit.errors import MethodError
from opdkit.lm_head import CHUNK_ENTRIES, blocks, chunks
from opdkit.pieces import Piece, flat, piece
from opdkit.step import Step


@piece("{num}.sampled", "{den}.sampled")
def log_ratio(step: Step, *, num: str = "teacher", den: str = "student") -> Float[Tensor, " N"]:
    """log num(y) - log den(y) of the sampled token; its mean under `den` is -KL(den, num)."""
    return step.views[num].sampled - step.views[den].sampled


@piece("{teacher}.distribution")
def expected_log_ratio(step: Step, *, teacher: str = "teacher") -> Float[Tensor, " N"]:
    """The mean of the log ratio under the student in closed form: -KL(student, teacher) at the prefix.

    Exact on support Full. On TopK both sides are renormalised over the candidates (2605.07865 Eqs. 14-15): still a
    valid baseline where the candidates do not depend on the sampled token, no longer the exact mean.
    """
    view = step.views[teacher]
    if view.full is None:
        assert view.candidates is not None
        c = view.candidates
        p = on_support(c.student, None, c.valid, "renormalise")
        q = on_support(c.teacher, None, c.valid, "renormalise")
        return -divergence(p, q, "reverse_kl")
    return -full_divergence(step, teacher, "reverse_kl")


def full_divergence(step: Step, teacher: str, kind: Kind, student: str = "student") -> Float[Tensor, " N"]:
    """Full-vocabulary divergence between two views with support Full, formed for a quarter of a head's chunk at a time."""
    p_rows, q_rows = step.views[student].full, step.views[teacher].full
    assert p_rows is not None and q_rows is not None
    n = step.tokens.shape[0]
    width = q_rows.log_probs(slice(0, 1)).shape[-1] if n else 1
    parts = []
    for part in chunks(n, max(1, CHUNK_ENTRIES // 4 // width)):
        p, q = p_rows.log_probs(part), q_rows.log_probs(part)
        parts += [divergence(p[block], q[block], kind) for block in blocks(p.shape[0], width, p.device)]
    return torch.cat(parts) if parts else step.views[teacher].sampled


@piece("{teacher}.candidates")
def support_gap(
    step: Step, *, teacher: str = "teacher", by: Literal["student", "teacher", "uniform"] = "student", raw: bool = False
) -> Float[Tensor, "N K"]:
    """w_k (log q_k - log p_k) on the candidates, with full-vocabulary log-probs (2604.13016, released code).

    `by` chooses the weight w: the student's mass, the teacher's, or "uniform". It is renormalised over the valid
    candidates (0 where there is none), unless `raw`: then it is the probability itself, or 1 for "uniform".
    """
    c = step.views[teacher].candidates
    assert c is not None
    logw = {"student": c.student, "teacher": c.teacher, "uniform": torch.zeros_like(c.student)}[by]
    weight = logw.exp() if raw else on_support(logw, None, c.valid, "renormalise").exp()
    return (weight * (c.teacher - c.student)).masked_fill(~c.valid, 0.0)


def _check_outcome(std: bool | str, eps: float, baseline: str) -> None:
    if not isinstance(std, bool) and std != "population":
        raise MethodError(f"outcome(std={std!r}): expected true, false or population")
    if eps < 0:
        raise MethodError(
            f"outcome(eps={eps}): expected 0 or more; it is added to the standard deviation of the rewards"
        )


@piece("rollouts.reward", "rollouts.group", check=_check_outcome)
def outcome(
    step: Step,
    *,
    std: bool | Literal["population"] = True,
    eps: float = 1e-6,
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean",
) -> Float[Tensor, " N"]:
    """Group-relative outcome advantage: reward minus a baseline, over (the group's standard deviation + eps) with `std`.

    group_mean: the mean of the prompt's group, GRPO's (2402.03300). leave_one_out: the mean of the other members, RLOO's
    (2402.14740); without `std` the expected gradient is then exact, while the group's own mean shrinks it by 1 - 1/G.
    std: true divides the variance by G - 1, as TRL and verl do; "population" by G, which makes the advantages
    sqrt(G / (G - 1)) times as large. In a group of one there is nothing to compare with: 0 with either baseline (verl keeps
    the raw reward there). In float64, so that a group of equal rewards has exactly 0 and not rounding over eps.
    """
    assert step.reward is not None
    layout, reward = step.layout, step.reward.double()
    size = layout.group_size().to(reward)
    centred = reward - layout.group_mean(reward)
    others = size / (size - 1).clamp(min=1)
    advantage = centred * others if baseline == "leave_one_out" else centred
    if std:
        variance = layout.group_mean(centred.square())
        advantage = advantage / ((variance if std == "population" else variance * others).sqrt() + eps)
    return layout.spread(advantage).to(step.reward.dtype)


def _check_discounted(of: Piece, gamma: float, future_only: bool, length_mean: bool) -> None:
    flat(of, "discounted")
    if not 0 <= gamma <= 1:
        raise MethodError(f"discounted(gamma={gamma}): expected a discount from 0 (this token) to 1 (all later ones)")
    if gamma == 0 and (future_only or length_mean):
        raise MethodError(
            "discounted(gamma=0) is the signal itself: no later token counts; drop future_only and length_mean"
        )


@piece(check=_check_discounted)
def discounted(
    step: Step, *, of: Piece, gamma: float = 1.0, future_only: bool = False, length_mean: bool = False
) -> Float[Tensor, " N"]:
    """sum over the tokens i >= t of the same sequence of gamma^(i - t) r_i: what this token and the later ones earn.

    `future_only` starts the sum at t + 1. `length_mean` divides by the number of summands, 0 where there is none: with
    `future_only` the length-normalised return of MiniLLM (2306.08543). Summed in float64.
    """
    rewards, layout = of(step), step.layout
    length = layout.seq_len()
    left = length[layout.seq] - layout.position()  # tokens from this one on
    total, reach = rewards.double(), 1
    longest = int(length.max()) if length.numel() else 0
    while reach < longest:  # after a pass, every token holds the sum over 2 x reach tokens from it on
        total = total + gamma**reach * _later(total, left, reach)
        reach *= 2
    if future_only:
        total, left = gamma * _later(total, left, 1), left - 1
    if length_mean:
        total = total / left.clamp(min=1)
    return total.to(rewards.dtype)


def _later(x: Float[Tensor, " N"], left: Tensor, shift: int) -> Float[Tensor, " N"]:
    """The value `shift` tokens later in the same sequence, 0 beyond its end."""
    moved = torch.cat([x[shift:], x.new_zeros(min(shift, x.shape[0]))])
    return moved.masked_fill(left <= shift, 0.0)


@piece()
def scheduled(step: Step, *, of: Piece, schedule: Callable[[float], float]) -> Tensor:
    """A signal times a schedule of the run's progress, such as Linear(start=1.0, end=0.0)."""
    return of(step) * schedule(step.progress)


def _check_clamp(of: Piece, low: float, high: float) -> None:
    if not low < high:
        raise MethodError(f"clamp(low={low}, high={high}): low must be below high, in nats")


@piece(check=_check_clamp)
def clamp(step: Step, *, of: Piece, low: float, high: float) -> Tensor:
    """A signal limited to [low, high] nats. The clamp makes an unbiased signal biased."""
    return of(step).clamp(low, high)


@piece()
def floor(step: Step, *, of: Piece, low: float) -> Tensor:
    """A signal limited to at least `low` nats. The floor makes an unbiased signal biased."""
    return of(step).clamp(min=low)


def clip_low(*, of: Piece, lam: float) -> Piece:
    """The reward floor log(lam) / (1 - lam) nats, 0 < lam < 1, of the reward-clipped OPD (2605.07865, released code)."""
    if not 0 < lam < 1:
        raise MethodError(f"clip_low(lam={lam}): expected a number strictly between 0 and 1")
    return floor(of=of, low=log(lam) / (1 - lam))
