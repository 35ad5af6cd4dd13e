"""Top-k on-policy distillation as released: every candidate token is an action with its own advantage (arXiv:2604.13016).

    A_k = w_k (log q_k - log p_k)  (detached, full-vocabulary log-probs),     L = - mean_t sum_k A_k log p(k)

The weight w renormalises the student's mass (`by="student"`), the teacher's, or is uniform over the candidate set
`of`: student, teacher, union, intersection ("overlap") or difference ("non-overlap", raw weights as released).
Biased for k < V: with c = log(Z_p / Z_q) the gradient is grad KL(p', q') + (KL(p', q') + c) grad log Z_p for `by`
student and `of` student (p', q' renormalised, Z the masses; card section c); equal to full-vocabulary OPD at k = V.
With `low`, `high` or `dual`, log p(k) becomes p(k) / p_old(k), clipped candidate by candidate (the released code clips at
0.2), for train.minibatches or train.epochs > 1; the first update of a rollout batch is the same.
Defaults: k = 16, of and by student: the released script's. Its paper writes the renormalised form, `topk_kl`, whose
gradient is 0 at k = 1. Raw uniform weights are 1 a candidate, as released.
"""

from typing import Literal

from opdkit.losses import SupportPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.signals import support_gap
from opdkit.support import Of, TopK


def topk_opd(
    *,
    teacher: str = "teacher",
    k: int = 16,
    of: Of = "student",
    by: Literal["student", "teacher", "uniform"] = "student",
    low: float | None = None,
    high: float | None = None,
    dual: float | None = None,
) -> Method:
    loss = SupportPolicyGradient("teacher", low, high, dual, ratio=(low, high, dual) != (None, None, None))
    signal = support_gap(by=by, raw=of == "difference")
    return Method(
        name="topk_opd",
        views={"teacher": View(teacher, TopK(k, of))},
        terms=(Term(loss=loss, signal=signal),),
    )
