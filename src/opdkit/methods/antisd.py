"""AntiSD: GRPO plus a bonus for tokens that the student shown a solution finds less likely (arXiv:2605.11609).

The teacher is the student shown a solution: u_t = log q(y_t) - log p(y_t) is the pointwise mutual information of token and
solution. Where it is negative are the words of a search ("Wait", "Maybe"): they are rewarded, by up to log(2) / 2.

    A_t = (R - mean_group R) / (std_group R + eps) - g lam phi(u_t),     phi(u) = (softplus(u) - log 2) / 2
    L = - mean_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)

-phi ascends the JSD of student and teacher (`mix`: the teacher's share). g is 0 or 1: `opdkit.gate.EntropyGate`. The
teacher reads the first correct other response of the group, else the data set's `solution` (None: siblings only), and
whether this response is right; its weights are the current ones: teachers: {teacher: {path: student:live}}. A closed
gate, and rollouts with nothing to show, are `grpo`. `form`: reverse_kl has -u for -phi, sd +u: plain self-distillation.
Defaults: lam, gate and clip are the paper's; std is unbiased as in verl, on which the paper runs.
Left out: the "multiplicative" and "no teacher" ablations. Whether a response may be its own solution is not said: no.
"""

from typing import Literal

from opdkit.contexts import Shown, Sibling, Solution
from opdkit.gate import EntropyGate
from opdkit.losses import ClippedPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import plus, scale
from opdkit.pmi import gated, phi
from opdkit.signals import log_ratio, outcome


def antisd(
    *,
    teacher: str = "teacher",
    lam: float = 0.5,
    form: Literal["antisd", "reverse_kl", "sd"] = "antisd",
    mix: float = 0.5,
    gate: bool = True,
    warmup: int = 5,
    close: float = 0.93,
    siblings: bool = True,
    solution: str | None = "auto",
    instruction: str | None = None,
    max_tokens: int | None = None,
    std: bool = True,
    low: float | None = 0.2,
    high: float | None = 0.2,
) -> Method:
    if lam <= 0:
        raise ValueError(f"lam = {lam} must be positive; without the bonus take grpo")
    if (form != "antisd" and mix != 0.5) or (not gate and (warmup, close) != (5, 0.93)):
        raise ValueError("mix has no effect on other forms than antisd, nor warmup and close without gate; remove them")
    texts = (Sibling(),) * siblings + (() if solution is None else (Solution(solution),))
    context = Shown(texts, assess=True, style="attempt", instruction=instruction, max_tokens=max_tokens)
    bonus = {"antisd": phi(of=log_ratio(), mix=mix), "reverse_kl": log_ratio(), "sd": scale(-1.0, log_ratio())}[form]
    signal = plus(outcome(std=std), scale(-lam, gated(of=bonus) if gate else bonus))
    return Method(
        name="antisd",
        views={"teacher": View(teacher, context=context)},
        terms=(Term(loss=ClippedPolicyGradient(low, high), signal=signal),),
        controllers=(EntropyGate(warmup=warmup, close=close),) if gate else (),
        watch={"pmi": log_ratio(), "phi": phi(of=log_ratio(), mix=mix)},
    )
