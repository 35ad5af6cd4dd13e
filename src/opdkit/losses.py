"""Losses: row-wise functions of the student's distribution at one position.

Axes: n rows, K support size, V vocabulary. All values in nats.

A loss says what it reads: the sampled token's log-prob, the log-probs on a view's candidates, or the whole row. The
first two are written once and differentiated on [n, K] tensors; a loss on the whole row also returns its gradient with
respect to the logits, because nothing of size n x V may be kept. Reduction over rows is not a loss's business: see
`opdkit.reduction`.

Left out: clipped and importance-weighted surrogates; every step here takes one optimiser update per rollout batch.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opdkit.step import Step
from opdkit.values import Value

Over = Literal["sampled", "candidates", "full"]
Kind = Literal["reverse_kl", "forward_kl", "jsd"]
NO_MASS = -1e4  # exp of it is 0 in every precision


@dataclass(frozen=True)
class StudentRows:
    """The current student's log-probs on n rows, normalised over the full vocabulary, with gradient."""

    sampled: Float[Tensor, " n"] | None
    candidates: Float[Tensor, "n K"] | None
    tail: Float[Tensor, " n"] | None


@runtime_checkable
class Loss(Protocol):
    """What every loss offers. `signal_rank` is 0 for no signal, 1 for [n] and 2 for [n, K]."""

    @property
    def signal_rank(self) -> int: ...

    def needs(self) -> tuple[str, ...]: ...

    def over(self, step: Step) -> Over: ...

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]: ...


@dataclass(frozen=True, repr=False)
class PolicyGradient(Value):
    """REINFORCE: - signal x log p(sampled token), the signal detached. Its value is not meaningful, its gradient is."""

    signal_rank = 1

    def needs(self) -> tuple[str, ...]:
        return ()

    def over(self, step: Step) -> Over:
        return "sampled"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None and signal is not None
        return -signal * student.sampled


@dataclass(frozen=True, repr=False)
class SupportPolicyGradient(Value):
    """- sum over candidates of signal_k x log p(k): every candidate is treated as an action (2604.13016, released code)."""

    teacher: str = "teacher"
    signal_rank = 2

    def needs(self) -> tuple[str, ...]:
        return (f"{self.teacher}.candidates",)

    def over(self, step: Step) -> Over:
        return "candidates"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.candidates is not None and signal is not None
        return -(signal * student.candidates).sum(-1)


@dataclass(frozen=True, repr=False)
class CrossEntropy(Value):
    """- log p(token) of the rollout's own token: supervised learning on dataset or teacher responses."""

    signal_rank = 0

    def needs(self) -> tuple[str, ...]:
        return ()

    def over(self, step: Step) -> Over:
        return "sampled"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None
        return -student.sampled


@dataclass(frozen=True, repr=False)
class Divergence(Value):
    """A divergence between student and teacher at every position, differentiated through the student.

    `kind`: reverse_kl = KL(student, teacher), forward_kl = KL(teacher, student), jsd = mix KL(teacher, m) +
    (1 - mix) KL(student, m) with m = mix teacher + (1 - mix) student. On a view with support Full the whole vocabulary
    is compared. On TopK, `tail` says what happens outside the candidates: "bucket" lumps the rest into one more
    outcome (a lower bound of the full divergence that is 0 only where both agree on it), "renormalise" forgets it.
    """

    kind: Kind = "reverse_kl"
    mix: float = 0.5  # the teacher's share of the mixture; only jsd reads it
    teacher: str = "teacher"
    tail: Literal["bucket", "renormalise"] = "bucket"
    signal_rank = 0

    def __post_init__(self) -> None:
        if self.kind not in ("reverse_kl", "forward_kl", "jsd"):
            raise ValueError(f"divergence kind is {self.kind!r}; expected reverse_kl, forward_kl or jsd")
        if not 0.0 < self.mix < 1.0:
            raise ValueError(
                f"mix = {self.mix} must lie strictly between 0 and 1; the ends are forward_kl and reverse_kl"
            )
        if self.kind != "jsd" and self.mix != 0.5:
            raise ValueError(f"mix = {self.mix} has no effect on {self.kind}; only jsd reads it")
        if self.tail not in ("bucket", "renormalise"):
            raise ValueError(f"tail is {self.tail!r}; expected 'bucket' or 'renormalise'")

    def needs(self) -> tuple[str, ...]:
        return (f"{self.teacher}.distribution",)

    def over(self, step: Step) -> Over:
        return "candidates" if step.views[self.teacher].full is None else "full"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        candidates = step.views[self.teacher].candidates
        assert candidates is not None and student.candidates is not None and student.tail is not None
        p = on_support(student.candidates, student.tail, candidates.valid, self.tail)
        q = on_support(candidates.teacher, candidates.teacher_tail, candidates.valid, self.tail)
        return divergence(p, q, self.kind, self.mix)

    def full(
        self, p: Float[Tensor, "n V"], q: Float[Tensor, "n V"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
        """Value and gradient with respect to the student's logits; `p`, `q` are log-probs.

        With a_j = dD/dp_j the logit gradient is p_j (a_j - sum_i p_i a_i).
        """
        if self.kind == "forward_kl":
            return torch.linalg.vecdot(q.exp(), q - p), p.exp() - q.exp()
        if self.kind == "reverse_kl":
            a, probs = p - q, p.exp()
            value = mean = torch.linalg.vecdot(probs, a)
        else:
            m = log_mixture(p, q, self.mix)
            a, probs = (p - m) * (1 - self.mix), p.exp()
            mean = torch.linalg.vecdot(probs, a)
            value = mean + self.mix * torch.linalg.vecdot(q.exp(), q - m)
        return value, probs * (a - mean[:, None])


def log_mixture(p: Float[Tensor, "*r"], q: Float[Tensor, "*r"], mix: float) -> Float[Tensor, "*r"]:
    """log(mix e^q + (1 - mix) e^p), `mix` being the teacher's share."""
    weight = p.new_tensor(mix)
    return torch.logaddexp(q + weight.log(), p + (1 - weight).log())


def divergence(p: Float[Tensor, "n J"], q: Float[Tensor, "n J"], kind: Kind, mix: float = 0.5) -> Float[Tensor, " n"]:
    """The named divergence between two sets of log-probs over the same J outcomes, by automatic differentiation."""
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = log_mixture(p, q, mix)
    return mix * (q.exp() * (q - m)).sum(-1) + (1 - mix) * (p.exp() * (p - m)).sum(-1)


def on_support(
    logp: Float[Tensor, "n K"], tail: Float[Tensor, " n"] | None, valid: Bool[Tensor, "n K"], how: str
) -> Float[Tensor, "n J"]:
    """Log-probs over the valid candidates: with the tail as one more outcome ("bucket", J = K + 1), or renormalised.

    An invalid column holds a log-prob so low that its mass is exactly 0, not -inf, which would make 0 x (-inf + inf);
    a row without a valid candidate has divergence 0 after renormalising.
    """
    kept = logp.masked_fill(~valid, NO_MASS)
    if how == "bucket":
        assert tail is not None
        return torch.cat([kept, tail[:, None]], -1)
    return kept.log_softmax(-1)
