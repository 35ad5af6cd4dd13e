"""Sampled divergence estimators, differentiated: a function of the sampled token's log ratio as the loss (arXiv:2402.03300).

    d_t = log p(y_t) - log q(y_t)     k2: d^2 / 2     k3: e^-d - 1 + d     abs: |d|

The losses of verl's distillation without policy gradient; GRPO uses k3 for its reference. One teacher log-prob a token, no
advantage. What is estimated is not what is descended: the expected gradients are those of KL(p, q) for k2, of KL(q, p)
for k3, and of twice the total variation for abs, on samples of the student that is trained (so one update a batch).
Default: k3, verl's. Left out: k1, whose gradient cannot see the teacher, and verl's limit of 10 nats on the value.
"""

from opdkit.losses import Estimator, SampledDivergence
from opdkit.method import Method, Term, View


def sampled_kl(*, teacher: str = "teacher", estimator: Estimator = "k3") -> Method:
    return Method(
        name="sampled_kl",
        views={"teacher": View(teacher)},
        terms=(Term(loss=SampledDivergence(estimator, "teacher")),),
    )
