"""Step-wise on-policy distillation: each turn of a tool-using response counts by its divergence, plus GRPO (arXiv:2605.07725).

A failed tool call leads the student where the teacher was never trained: the gap of their log-probs grows from turn to turn,
and a large gap is then noise rather than a strong signal. A turn k is a block of the student's own tokens between tool texts:

    d_k = mean over turn k of |log q(y_t) - log p(y_t)|,     w_1 = 1,  w_k = min((d_1 + eps) / (d_k + eps), cap)
    how="signal":  A_t = (R - mean_group R) / (std_group R + 1e-6) + opd_coef w_k (log q(y_t) - log p(y_t))
                   L = - mean_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t),  bounded by - dual A_t where A_t < 0

how="terms" lets outcome and distillation meet the clip apart (see `grpo_opd`); both are the same at r = 1. A response of one
turn has w = 1: `grpo_opd`, and plain `opd` where all rewards of a group are equal. `floor`: the least d_1 (nats/token).
The reward is mapped from 0..1 to -1..1; a wrong response gets call_bonus for each tool call, at most call_bonus_most, and
`overlong` tokens before the limit a penalty begins that reaches overlong_factor (`opdkit.rewards.shaping`).
Defaults: the released script's, but for its `overlong` of 1024 tokens, which belongs to its limit of 20480.
The cap is the paper's 1 + delta. Left out: its ablations that know which call failed, and the released code's "gated" weight
(`opdkit.turns.outcome_gate`).
"""

from typing import Literal

from opdkit.losses import ClippedPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import Piece, plus, scale, times
from opdkit.rewards.shaping import shaping
from opdkit.signals import log_ratio, outcome
from opdkit.turns import turn_gap, turn_weight, within


def sod(
    *,
    teacher: str = "teacher",
    how: Literal["signal", "terms"] = "signal",
    opd_coef: float = 1.0,
    cap: float | None = 1.2,
    eps: float = 1e-6,
    floor: float = 0.0,
    std: bool | Literal["population"] = True,
    signed: bool = True,
    call_bonus: float = 0.1,
    call_bonus_most: float = 0.4,
    overlong: int | None = None,
    overlong_factor: float = 1.0,
    low: float | None = 0.2,
    high: float | None = 0.28,
    dual: float | None = 3.0,
) -> Method:
    if opd_coef <= 0:
        raise ValueError(f"opd_coef = {opd_coef} must be positive; without distillation take grpo")
    weight, loss = turn_weight(cap=cap, eps=eps, floor=floor), ClippedPolicyGradient(low, high, dual)
    reward, distilled = outcome(std=std), times(weight, log_ratio())
    terms: tuple[Term, ...] = (Term(loss=loss, signal=plus(reward, scale(opd_coef, distilled))),)
    if how == "terms":
        terms = (Term(loss=loss, signal=reward), Term(loss=loss, signal=distilled, coef=opd_coef))
    watch: dict[str, Piece] = {"turn_gap": turn_gap(), "turn_weight": weight, "weighted_gap": times(weight, turn_gap())}
    watch |= {"small_weight": within(of=weight, high=0.5)}
    if cap is not None:
        watch |= {"capped_weight": within(of=weight, low=cap)}
    prepare = shaping(signed=signed, call_bonus=call_bonus, call_bonus_most=call_bonus_most, overlong=overlong,
                      overlong_factor=overlong_factor)  # fmt: skip
    return Method(name="sod", prepare=prepare, views={"teacher": View(teacher)}, terms=terms, watch=watch)
