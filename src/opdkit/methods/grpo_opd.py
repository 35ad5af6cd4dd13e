"""Outcome reward and distillation together: GRPO's advantage plus the teacher's log ratio (arXiv:2506.02208).

    how="signal":  L = - mean_t min(r_t (A + c d_t), clip(r_t) (A + c d_t))
    how="terms":   L = - mean_t min(r_t A, clip(r_t) A) - c mean_t min(r_t d_t, clip(r_t) d_t)
    A = (R - mean_group R) / (std_group R + eps),   d_t = log q(y_t) - log p(y_t),   c = opd_coef

One signal (slime, ms-swift) and two terms (verl) have the same gradient while r = 1, the first update of a rollout
batch. After it they differ: in one signal the sign of the sum decides on which side of the clip a token stands, so a
large |A| can switch the teacher off; in two terms each part meets the clip alone.
Where every response of a group earns the same, A = 0 and this is `opd` times c. Defaults: std and clip as in `grpo`,
c = 1 (slime's and ms-swift's; AReaL's joint mode has 0.005).
Left out: the paper's other estimators of the KL, its masks by reward, and a schedule of c.
"""

from typing import Literal

from opdkit.losses import ClippedPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import plus, scale
from opdkit.signals import log_ratio, outcome


def grpo_opd(
    *,
    teacher: str = "teacher",
    how: Literal["signal", "terms"] = "signal",
    opd_coef: float = 1.0,
    std: bool | Literal["population"] = True,
    eps: float = 1e-6,
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean",
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = None,
) -> Method:
    if opd_coef <= 0:
        raise ValueError(f"opd_coef = {opd_coef} must be positive; without distillation take grpo")
    reward, loss = outcome(std=std, eps=eps, baseline=baseline), ClippedPolicyGradient(low, high, dual)
    terms: tuple[Term, ...] = (Term(loss=loss, signal=plus(reward, scale(opd_coef, log_ratio()))),)
    if how == "terms":
        terms = (Term(loss=loss, signal=reward), Term(loss=loss, signal=log_ratio(), coef=opd_coef))
    return Method(name="grpo_opd", views={"teacher": View(teacher)}, terms=terms)
