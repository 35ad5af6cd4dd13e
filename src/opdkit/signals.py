"""Signals: what is rewarded at every token. Pure functions Step -> [N] or [N, K], detached, in nats.

Axes: N trained tokens, K support size. "student" is the policy that sampled, before the update.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.head import blocks
from opdkit.losses import divergence, on_support
from opdkit.pieces import Piece, piece
from opdkit.step import Step


@piece("{num}.sampled", "{den}.sampled")
def log_ratio(step: Step, *, num: str = "teacher", den: str = "student") -> Float[Tensor, " N"]:
    """log num(y) - log den(y) of the sampled token; its mean under `den` is -KL(den, num)."""
    return step.views[num].sampled - step.views[den].sampled


@piece("{teacher}.distribution")
def expected_log_ratio(step: Step, *, teacher: str = "teacher") -> Float[Tensor, " N"]:
    """The mean of the log ratio under the student in closed form: -KL(student, teacher) at the prefix.

    Exact on support Full. On TopK both sides are renormalised over the candidates (2605.07865 Eqs. 14-15): still a
    valid baseline where the candidates do not depend on the sampled token, no longer the exact mean.
    """
    view = step.views[teacher]
    if view.full is None:
        assert view.candidates is not None
        c = view.candidates
        p = on_support(c.student, None, c.valid, "renormalise")
        q = on_support(c.teacher, None, c.valid, "renormalise")
        return -divergence(p, q, "reverse_kl")
    return -full_divergence(step, teacher, "reverse_kl")


def full_divergence(step: Step, teacher: str, kind: str, student: str = "student") -> Float[Tensor, " N"]:
    """Full-vocabulary divergence between two views with support Full, formed in small blocks of rows."""
    p_rows, q_rows = step.views[student].full, step.views[teacher].full
    assert p_rows is not None and q_rows is not None
    n = step.tokens.shape[0]
    width = q_rows.log_probs(slice(0, 1)).shape[-1] if n else 1
    parts = []
    for block in blocks(n, max(1, width // 8)):  # eight elementwise blocks: enough rows for an efficient product
        parts.append(divergence(p_rows.log_probs(block), q_rows.log_probs(block), kind))  # type: ignore[arg-type]
    return torch.cat(parts) if parts else step.views[teacher].sampled


@piece("{teacher}.candidates")
def support_gap(
    step: Step, *, teacher: str = "teacher", by: str = "student", raw: bool = False
) -> Float[Tensor, "N K"]:
    """w_k (log q_k - log p_k) on the candidates, with full-vocabulary log-probs (2604.13016, released code).

    `by` chooses the weight w: the student's mass, the teacher's, or "uniform". It is renormalised over the valid
    candidates (0 where there is none), unless `raw`: then it is the probability itself, or 1 for "uniform".
    """
    c = step.views[teacher].candidates
    assert c is not None
    if by not in ("student", "teacher", "uniform"):
        raise ValueError(f"support_gap(by={by!r}): expected student, teacher or uniform")
    logw = {"student": c.student, "teacher": c.teacher, "uniform": torch.zeros_like(c.student)}[by]
    weight = logw.exp() if raw else on_support(logw, None, c.valid, "renormalise").exp()
    return (weight * (c.teacher - c.student)).masked_fill(~c.valid, 0.0)


@piece("rollouts.reward", "rollouts.group")
def outcome(step: Step, *, std: bool = True, eps: float = 1e-6) -> Float[Tensor, " N"]:
    """Group-relative outcome advantage of GRPO (2402.03300): reward minus its group's mean, over the group's
    standard deviation (unbiased, + eps) unless `std` is off."""
    assert step.reward is not None
    layout = step.layout
    centred = step.reward - layout.group_mean(step.reward)
    if std:
        size = layout.group_size()
        variance = layout.group_mean(centred.square()) * size / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    return layout.spread(centred)


@piece()
def clamp(step: Step, *, of: Piece, low: float, high: float) -> Tensor:
    """A signal limited to [low, high] nats. The clamp makes an unbiased signal biased."""
    return of(step).clamp(low, high)
