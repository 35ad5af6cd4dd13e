"""GRPO: group-relative policy optimisation on the verifier's reward, without a teacher (arXiv:2402.03300).

    A = (R - mean_group R) / (std_group R + eps),     r_t = p(y_t) / p_old(y_t)
    L = - mean_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl_coef mean_t k3_t - entropy_coef mean_t H(p_t)
    k3_t = b/p - 1 - log(b/p) of the sampled token, b = view "reference", usually the student before training

`std=False` is Dr. GRPO's advantage (2503.20783), `baseline="leave_one_out"` RLOO's (2402.14740); a group of one has
advantage 0. The first update of a rollout batch has r = 1, so the clip acts with train.minibatches or train.epochs > 1.
k3 estimates KL(p, b) without bias, but its gradient is that of KL(b, p); `kl="k2"` has the gradient of KL(p, b).
Defaults: std on, token mean, no KL and no entropy bonus as in the core paper's teacher recipe (2604.13016 section e);
clip 0.2 and k3 as in GRPO's own (whose kl_coef is 0.04).
`std="population"` divides the variance by G, not G - 1. `overlong`: within so many tokens of the response limit the reward
falls linearly by up to overlong_factor (DAPO's soft penalty, 2503.14476; `opdkit.rewards.shaping.Overlong`).
Left out: dynamic sampling of prompts (groups with one outcome only give no gradient; `mixed_groups` is logged).
"""

from typing import Literal

from opdkit.losses import ClippedPolicyGradient, Entropy, SampledDivergence
from opdkit.method import Method, Term, View
from opdkit.rewards.shaping import shaping
from opdkit.signals import outcome


def grpo(
    *,
    std: bool | Literal["population"] = True,
    eps: float = 1e-6,
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean",
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = None,
    kl_coef: float = 0.0,
    kl: Literal["k2", "k3"] = "k3",
    reference: str = "reference",
    entropy_coef: float = 0.0,
    overlong: int | None = None,
    overlong_factor: float = 1.0,
) -> Method:
    if kl_coef < 0 or entropy_coef < 0:
        raise ValueError(f"kl_coef = {kl_coef} and entropy_coef = {entropy_coef} must not be negative; 0 = off")
    if not kl_coef and (kl, reference) != ("k3", "reference"):
        raise ValueError(
            f"kl = {kl!r} and reference = {reference!r} have no effect with kl_coef = 0; set it or drop them"
        )
    signal = outcome(std=std, eps=eps, baseline=baseline)
    terms = [Term(loss=ClippedPolicyGradient(low, high, dual), signal=signal)]
    if kl_coef:
        terms.append(Term(loss=SampledDivergence(kl, teacher="reference"), coef=kl_coef))
    if entropy_coef:
        terms.append(Term(loss=Entropy(), coef=entropy_coef))
    prepare = shaping(overlong=overlong, overlong_factor=overlong_factor)
    views = {"reference": View(reference)} if kl_coef else {}
    return Method(name="grpo", prepare=prepare, views=views, terms=tuple(terms))
