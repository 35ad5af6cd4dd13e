"""vOPD: sampled-token on-policy distillation with its own value as a control variate (arXiv:2605.07865).

The reward log q(y_t) - log p(y_t) has the mean -KL(p_t, q_t) under the student. Subtract it, detached: the expected
gradient stays that of `opd`, for any k, and the variance normally drops.

    A_t = log q(y_t) - log p(y_t) + KL(p_t, q_t),     L = - mean_t A_t log p(y_t)

k = None takes the KL over the full vocabulary (the released vopd.yaml). With k it is taken on the student's top-k,
both sides renormalised (Eqs. 14-15; the paper uses k = 20, its released yaml 100); k = 1 is `opd`.
With `low`, `high` or `dual` the loss is PPO's clipped surrogate, for train.minibatches or train.epochs > 1; the first
update of a rollout batch is the same. Default: none, the paper's.
Left out: the reward-clipped variant, and normalising the advantage, which the paper does not do either.
"""

from opdkit.losses import ClippedPolicyGradient, PolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import minus
from opdkit.signals import expected_log_ratio, log_ratio
from opdkit.support import Full, TopK


def vopd(
    *,
    teacher: str = "teacher",
    k: int | None = None,
    low: float | None = None,
    high: float | None = None,
    dual: float | None = None,
) -> Method:
    clipped = (low, high, dual) != (None, None, None)
    loss = ClippedPolicyGradient(low, high, dual) if clipped else PolicyGradient()
    return Method(
        name="vopd",
        views={"teacher": View(teacher, Full() if k is None else TopK(k))},
        terms=(Term(loss=loss, signal=minus(log_ratio(), expected_log_ratio())),),
    )
