"""Sampled-token on-policy distillation: reward log teacher - log student of each sampled token (arXiv:2604.13016).

    A_t = log q(y_t) - log p(y_t)  (detached),     L = - mean_t A_t log p(y_t)

Its expected gradient at a prefix is exactly the gradient of KL(student, teacher) there (card, identity 1).
`discount` g > 0 rewards a token for its successors too: A_t = sum_{i >= t} g^(i - t) (log q - log p)(y_i); at g = 1 the
expected gradient is that of the KL between whole responses (summed over tokens: train.reduction seq_mean_token_sum).
With `low`, `high` or `dual` the loss is PPO's clipped surrogate, for train.minibatches or train.epochs > 1; the first
update of a rollout batch is the same.
Defaults: no baseline, whitening, discount or clip, token mean: the paper's and its code's.
"""

from opdkit.losses import ClippedPolicyGradient, PolicyGradient
from opdkit.method import Method, Term, View
from opdkit.signals import discounted, log_ratio


def opd(
    *,
    teacher: str = "teacher",
    discount: float = 0.0,
    low: float | None = None,
    high: float | None = None,
    dual: float | None = None,
) -> Method:
    signal = discounted(of=log_ratio(), gamma=discount) if discount else log_ratio()
    clipped = (low, high, dual) != (None, None, None)
    loss = ClippedPolicyGradient(low, high, dual) if clipped else PolicyGradient()
    return Method(name="opd", views={"teacher": View(teacher)}, terms=(Term(loss=loss, signal=signal),))
