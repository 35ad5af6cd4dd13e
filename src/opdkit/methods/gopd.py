"""Generalised OPD: the teacher's reward over a reference, scaled by lam; beyond the teacher for lam > 1 (arXiv:2602.12125).

    A_t = lam log q - log p - (lam - 1) log b   of the sampled token, detached;   b = view "reference"
    L = - mean_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t),   w_t = min(p / p_sampler, importance_cap)

A_t = (log q - log p) + (lam - 1) (log q - log b): OPD plus (lam - 1) times the implicit reward of teacher over reference.
Its expected gradient at a prefix is that of KL(p, q^lam b^(1-lam) / Z). lam in (0, 1) interpolates reference and teacher;
lam = 1 is `opd` and reads no reference; so does a reference that equals the teacher, at twice the scoring.
`lam_end` moves lam linearly from `lam` to it over the first `until` of the run. The reference is the student before
training (teachers: {reference: {path: student:base}}); with a larger teacher take the teacher's checkpoint before its RL
(the paper's reward correction, item 4 of the card): give that model as `reference`. Defaults: lam 1.25 (1.5 was
unstable), clip 0.2, dual 3 and cap 5: the paper's runs; p / p_sampler is 1 unless top-p or top-k truncates.
Left out: a teacher per domain. lam > 1 can destroy near-deterministic formats (2605.08737), which this does not watch.
"""

from opdkit.losses import ClippedPolicyGradient
from opdkit.method import Linear, Method, Term, View
from opdkit.pieces import plus, scale
from opdkit.signals import log_ratio, scheduled
from opdkit.weights import importance, ones


def gopd(
    *,
    teacher: str = "teacher",
    reference: str = "reference",
    lam: float = 1.25,
    lam_end: float | None = None,
    until: float = 1.0,
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = 3.0,
    importance_cap: float | None = 5.0,
) -> Method:
    if lam < 0 or (lam_end is not None and lam_end < 0):
        raise ValueError(f"lam = {lam}, lam_end = {lam_end}: expected at least 0; 0 = the reference, 1 = the teacher")
    if lam_end is None and until != 1.0:
        raise ValueError(f"until = {until} has no effect without lam_end; give the lam at which the run ends")
    signal, views = log_ratio(), {"teacher": View(teacher)}
    if lam != 1.0 or lam_end not in (None, 1.0):
        reward = log_ratio(den="reference")
        if lam_end is None:
            signal = plus(signal, scale(lam - 1, reward))
        else:
            signal = plus(signal, scheduled(of=reward, schedule=Linear(lam - 1, lam_end - 1, until)))
        views["reference"] = View(reference)
    elif reference != "reference":
        raise ValueError(f"reference = {reference!r} has no effect at lam = 1, which is plain OPD; remove it")
    weight = ones() if importance_cap is None else importance(cap=importance_cap)
    loss = ClippedPolicyGradient(low, high, dual)
    return Method(name="gopd", views=views, terms=(Term(loss=loss, signal=signal, weight=weight),))
