"""Sampled-token on-policy distillation: reward log teacher - log student of each sampled token (arXiv:2604.13016).

    A_t = log q(y_t) - log p(y_t)  (detached),     L = - mean_t A_t log p(y_t)

Its expected gradient at a prefix is exactly the gradient of KL(student, teacher) there (card, identity 1).
Defaults: no baseline, whitening, discount or clip of the advantage, token mean: the paper's and its code's.
Left out: PPO clip and ratio, which are inert with one update per rollout batch.
"""

from opdkit.method import Method, Term, View
from opdkit.signals import log_ratio


def opd(*, teacher: str = "teacher") -> Method:
    return Method(name="opd", views={"teacher": View(teacher)}, terms=(Term(signal=log_ratio()),))
