"""MiniLLM: the sequence-level reverse KL, from samples of student and teacher mixed (arXiv:2306.08543).

    y_t ~ mix q + (1 - mix) p,      w_t = p(y_t) / (mix q(y_t) + (1 - mix) p(y_t)),      r_i = log q(y_i) - log p(y_i)
    L = mean_t w_t KL(p_t, q_t) - mean_t w_t R_t log p(y_t),      R_t = mean_{i > t} r_i   (detached)

The first term is exact for the token itself (the paper's single step), the second hands it what its successors earn.
With length_norm=False, R_t is the sum over i > t; then, with mix = 0 and train.reduction: seq_mean_token_sum, the expected
gradient is exactly that of the KL between whole responses. Length normalisation changes the objective (against short
answers). The token weight w_t is the paper's approximation, at most 1 / (1 - mix): it corrects token t, not the prefix
that was drawn from the mixture nor the rest of the response, and is biased; `level="sequence"`, one product for all
tokens of a response, is unbiased and noisy, and `importance_cap` bounds either.
Several updates per rollout batch are clipped as in PPO. Defaults: the paper's: mix 0.2, length normalisation, clip 0.2.
Left out: the language-modelling loss on a pre-training corpus, and the whitening and scaling of the released code.
A public trainer discounts with gamma^t twice and counts padding; here a sum starts at its own token and ends with it.
"""

from typing import Literal

from opdkit.losses import ClippedPolicyGradient, Divergence
from opdkit.method import Method, Term, View
from opdkit.signals import discounted, log_ratio
from opdkit.sources import OnPolicy
from opdkit.support import Full
from opdkit.weights import importance, ones


def minillm(
    *,
    teacher: str = "teacher",
    mix: float = 0.2,
    length_norm: bool = True,
    level: Literal["token", "sequence"] = "token",
    importance_cap: float | None = None,
    low: float | None = 0.2,
    high: float | None = 0.2,
) -> Method:
    if not mix and (level, importance_cap) != ("token", None):
        raise ValueError(
            "level and importance_cap have no effect with mix = 0: every token is the student's; drop them"
        )
    weight = importance(level=level, cap=importance_cap) if mix else ones()
    future = discounted(of=log_ratio(), future_only=True, length_mean=length_norm)
    return Method(
        name="minillm",
        rollouts={"policy": OnPolicy(mixed_with=teacher if mix else None, mix=mix)},
        views={"teacher": View(teacher, Full())},
        terms=(
            Term(loss=Divergence("reverse_kl"), weight=weight),
            Term(loss=ClippedPolicyGradient(low, high), signal=future, weight=weight),
        ),
    )
