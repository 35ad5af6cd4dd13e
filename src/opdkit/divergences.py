"""Divergences between a student p and a teacher q at one position, as sums over outcomes with hand-written slopes.

Axes: n rows, J outcomes (the vocabulary, or the candidates and their tail), K support size. Log-probabilities in nats.

`mix` is always the teacher's share of a mixture m = mix q + (1 - mix) p:

    reverse_kl         sum p log(p / q)                      total_variation    sum |p - q| / 2
    forward_kl         sum q log(q / p)                      alpha              (sum q^a p^(1-a) - 1) / (a (a - 1))
    jsd                mix KL(q, m) + (1 - mix) KL(p, m)     cross_entropy      - sum q log p
    skew_forward_kl    KL(q, m)                              skew_reverse_kl    KL(p, m)

Left out: divergences that are infinite on ordinary language-model rows, such as chi-squared (alpha outside (0, 1)).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Kind = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "cross_entropy",
]  # fmt: skip
Tail = Literal["bucket", "renormalise", "raw"]
MIXED = ("jsd", "skew_forward_kl", "skew_reverse_kl")  # the kinds that read `mix`
NO_MASS = -1e4  # exp of it is 0 in every precision
ALPHA_MARGIN = 1e-3  # nearer to 0 or 1 than this, 1 / (a (1 - a)) magnifies rounding


def check_divergence(kind: Kind, mix: float, alpha: float) -> None:
    """Raise ValueError for an unknown kind, a share outside (0, 1), or a parameter that the kind does not read."""
    if kind not in get_args(Kind):
        raise ValueError(f"divergence kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    if kind not in MIXED and mix != 0.5:
        raise ValueError(f"mix = {mix} has no effect on {kind}; only {', '.join(MIXED)} read it")
    if kind != "alpha" and alpha != 0.5:
        raise ValueError(f"alpha = {alpha} has no effect on {kind}; only kind alpha reads it")
    if not 0.0 < mix < 1.0:
        ends = {
            "jsd": "the ends are forward_kl (0) and reverse_kl (1)",
            "skew_forward_kl": "0 is forward_kl, and 1 compares the teacher with itself",
            "skew_reverse_kl": "1 is reverse_kl, and 0 compares the student with itself",
        }
        raise ValueError(f"mix = {mix} must lie strictly between 0 and 1; {ends[kind]}")
    if not ALPHA_MARGIN <= alpha <= 1 - ALPHA_MARGIN:
        raise ValueError(
            f"alpha = {alpha} must lie in [{ALPHA_MARGIN}, {1 - ALPHA_MARGIN}]: near 0 take reverse_kl and near 1 "
            "forward_kl, its limits; outside (0, 1) the divergence is infinite where one side has no mass"
        )


@dataclass
class LogProbs:
    """Log-probs of some rows, in nats; their exponentials are formed once, when they are first asked for.

    Whoever has normalised the rows gives the exponentials of their logits, shifted, and the sums to divide them by.
    """

    log: Float[Tensor, "*r"]
    shifted: Float[Tensor, "*r"] | None = None
    norm: Float[Tensor, "*b 1"] | None = None

    @cached_property
    def mass(self) -> Float[Tensor, "*r"]:
        """The probabilities; not to be changed while anybody reads them."""
        if self.shifted is None or self.norm is None:
            return self.log.exp()
        return self.shifted.div_(self.norm)


@dataclass(frozen=True)
class Entries:
    """A divergence outcome by outcome: summands l, and slopes s with dl / dlog p = s - free x mass.

    The softmax removes any multiple of the student's mass from the slopes, so s is the form that vanishes at p = q.
    """

    value: Float[Tensor, "n J"]
    slope: Float[Tensor, "n J"]
    mass: Float[Tensor, "n J"]  # the student's probabilities
    free: float = 0.0


def divergence(
    p: Float[Tensor, "n J"], q: Float[Tensor, "n J"], kind: Kind, mix: float = 0.5, alpha: float = 0.5
) -> Float[Tensor, " n"]:
    """The named divergence between two sets of log-probs over the same J outcomes; differentiable in p."""
    return entries(LogProbs(p), LogProbs(q), kind, mix, alpha).value.sum(-1)


def entries(student: LogProbs, teacher: LogProbs, kind: Kind, mix: float, alpha: float) -> Entries:
    """Summands and slopes of the named divergence; only the summands are meant to be differentiated.

    Those of total_variation and alpha are never negative: alpha's is (a q + (1 - a) p - q^a p^(1 - a)) / (a (1 - a)),
    whose linear parts add up to 1 over all outcomes.
    """
    if kind in MIXED:
        return _mixed(student, teacher, kind, mix)
    p, q, ours = student.log, teacher.log, student.mass
    if kind == "reverse_kl":
        value = ours * (p - q)
        return Entries(value, value, ours, -1.0)
    theirs = teacher.mass
    if kind == "total_variation":
        side = above(p, q) / 2
        return Entries(side * (ours - theirs), side * ours, ours)
    if kind == "alpha":
        both = (alpha * q + (1 - alpha) * p).exp()
        value = (alpha * theirs + (1 - alpha) * ours - both) / (alpha * (1 - alpha))
        return Entries(value, (ours - both) / alpha, ours)
    return Entries(-theirs * (p if kind == "cross_entropy" else p - q), ours - theirs, ours, 1.0)


def _mixed(student: LogProbs, teacher: LogProbs, kind: Kind, mix: float) -> Entries:
    """The kinds that compare with m = mix q + (1 - mix) p.

    log m is taken of the sum of masses, at half the cost of `log_mixture`. Where both masses are below the smallest
    normal number it is wrong, and counts for nothing: every summand has a mass as its factor.
    """
    p, q, ours, theirs = student.log, teacher.log, student.mass, teacher.mass
    mixture = torch.lerp(ours, theirs, mix).clamp_(min=torch.finfo(p.dtype).tiny)
    if kind == "jsd":
        m = mixture.log_()
        slope = ((p - m) * ours) * (1 - mix)
        return Entries(torch.addcmul(slope, theirs, q - m, value=mix), slope, ours)
    m, share = mixture.log(), theirs / mixture  # q / m, at most 1 / mix
    del mixture  # a block of [n, J], like everything here
    value = theirs * (q - m) if kind == "skew_forward_kl" else ours * (p - m)
    del theirs, m
    if kind == "skew_forward_kl":
        return Entries(value, (1 - mix) * torch.addcmul(ours, ours, share, value=-1), ours, 1 - mix)
    return Entries(value, torch.add(value, ours * (share - 1), alpha=mix), ours, -mix)


def log_mixture(p: Float[Tensor, "*r"], q: Float[Tensor, "*r"], mix: float) -> Float[Tensor, "*r"]:
    """log(mix e^q + (1 - mix) e^p), `mix` being the teacher's share."""
    weight = p.new_tensor(mix)
    return torch.logaddexp(q + weight.log(), p + (1 - weight).log())


def above(p: Float[Tensor, "*r"], q: Float[Tensor, "*r"]) -> Float[Tensor, "*r"]:
    """The sign of p - q, without gradient: 0 where two log-probs agree up to rounding.

    The sign of a rounding error would be a gradient of full size: two passes over one distribution differ in the last
    digits. The dead zone is 64 units of the last place of the larger of 1 and |q|, 8e-6 nats in float32.
    """
    gap = (p - q).detach()
    slack = 64 * torch.finfo(p.dtype).eps * q.detach().abs().clamp(min=1.0)
    return torch.where(gap.abs() <= slack, 0.0, gap.sign())


def on_support(
    logp: Float[Tensor, "n K"], tail: Float[Tensor, " n"] | None, valid: Bool[Tensor, "n K"], how: Tail
) -> Float[Tensor, "n J"]:
    """Log-probs over the valid candidates. `how`: the tail as one more outcome ("bucket", J = K + 1), renormalised, or
    as they are ("raw").

    An invalid column holds a log-prob so low that its mass is exactly 0, not -inf, which would make 0 x (-inf + inf). A
    row without a valid candidate has no mass and divergence 0, unless the tail counts.
    """
    kept = logp.masked_fill(~valid, NO_MASS)
    if how == "bucket":
        assert tail is not None
        return torch.cat([kept, tail[:, None]], -1)
    return kept if how == "raw" else kept.log_softmax(-1).masked_fill(~valid, NO_MASS)
