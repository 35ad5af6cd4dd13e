"""Losses: row-wise functions of the student's distribution at one position.

Axes: n rows, K support size, V vocabulary. All values in nats.

A loss says what it reads: the sampled token's log-prob, the log-probs on a view's candidates, or the whole row. The
first two are written once and differentiated on [n, K] tensors; a loss on the whole row also returns its gradient with
respect to the logits, because nothing of size n x V may be kept. Reduction over rows is not a loss's business: see
`opdkit.reduction`. Their interface is in `opdkit.rows`, the formulas of the divergences in `opdkit.divergences`.

Left out: losses that read more than one position.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.divergences import (
    Kind,
    LogProbs,
    Tail,
    above,
    check_divergence,
    entries,
    on_support,
)
from opdkit.ratios import LOG_RATIO_LIMIT, check_clip, clipped, ratio
from opdkit.rows import Over, StudentRows
from opdkit.step import Step
from opdkit.values import Value

Estimator = Literal["k2", "k3", "abs"]


# ---------------------------------------------------------------------------------------------------------------------
# The sampled token, and candidates as actions


class _OnSampled(Value):
    """Parts that losses on the sampled token share."""

    teacher: str | None = None
    signal_rank = 0
    own_samples = True

    def needs(self) -> tuple[str, ...]:
        return ()

    def over(self, step: Step) -> Over:
        return "sampled"


@dataclass(frozen=True, repr=False)
class CrossEntropy(_OnSampled):
    """- log p(token) of the rollout's own token: supervised learning on dataset or teacher responses."""

    own_samples = False

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None
        return -student.sampled


@dataclass(frozen=True, repr=False)
class PolicyGradient(_OnSampled):
    """REINFORCE: - signal x log p(sampled token), the signal detached. Its value is not meaningful, its gradient is."""

    signal_rank = 1

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None and signal is not None
        return -signal * student.sampled


@dataclass(frozen=True, repr=False)
class ClippedPolicyGradient(_OnSampled):
    """PPO's surrogate - min(r A, clip(r, 1 - low, 1 + high) A), r = p / p_old of the sampled token (1707.06347 Eq. 7).

    p_old is view "student": the policy that sampled. The first update of a rollout batch has r = 1 and the gradient of
    `PolicyGradient`; a token whose ratio has left the range in the direction of A has gradient 0 afterwards. `dual` > 1
    bounds r where A < 0, so that the loss is at most - dual x A (1912.09729 Eq. 5). A side that is None is open; with
    both open this is the importance-sampled surrogate. Defaults 0.2: 1707.06347.
    """

    low: float | None = 0.2
    high: float | None = 0.2
    dual: float | None = None
    signal_rank = 1

    def __post_init__(self) -> None:
        check_clip(self.low, self.high, self.dual)

    def needs(self) -> tuple[str, ...]:
        return ("student.sampled",)

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None and signal is not None
        r = ratio(student.sampled, step.views["student"].sampled)
        return -signal * clipped(r, signal, self.low, self.high, self.dual)


@dataclass(frozen=True, repr=False)
class SupportPolicyGradient(Value):
    """- sum over candidates of signal_k x log p(k): every candidate is treated as an action (2604.13016, released code).

    With `ratio`, log p(k) becomes p(k) / p_old(k), clipped candidate by candidate as in `ClippedPolicyGradient`; p_old
    is the student that sampled.
    """

    teacher: str = "teacher"
    low: float | None = None
    high: float | None = None
    dual: float | None = None
    ratio: bool = False
    signal_rank = 2
    own_samples = True

    def __post_init__(self) -> None:
        check_clip(self.low, self.high, self.dual)
        if not self.ratio and (self.low, self.high, self.dual) != (None, None, None):
            raise ValueError(f"{self}: a clip has no effect without a ratio; set ratio=True or drop low, high and dual")

    def needs(self) -> tuple[str, ...]:
        return (f"{self.teacher}.candidates",)

    def over(self, step: Step) -> Over:
        return "candidates"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.candidates is not None and signal is not None
        if not self.ratio:
            return -(signal * student.candidates).sum(-1)
        found = step.views[self.teacher].candidates
        assert found is not None
        r = ratio(student.candidates, found.student)
        return -(signal * clipped(r, signal, self.low, self.high, self.dual)).sum(-1)


@dataclass(frozen=True, repr=False)
class SampledDivergence(_OnSampled):
    """A function of log p - log q of the sampled token, differentiated: Schulman's k2, k3, and the absolute value.

    With d = log p - log q: k2 = d^2 / 2, k3 = e^-d - 1 + d, abs = |d|. Under the student's own samples the expected
    gradients are those of KL(student, teacher), of KL(teacher, student), and of twice the total variation, whatever the
    values estimate. k1 = d is refused: the gradient of log q is 0, so its gradient, the score, cannot see the teacher.
    """

    estimator: Estimator = "k3"
    teacher: str = "reference"

    def __post_init__(self) -> None:
        if str(self.estimator) == "k1":
            raise ValueError("SampledDivergence(estimator='k1'): its gradient is the score, which does not contain the "
                              "teacher; take k2, or PolicyGradient with the signal log_ratio")  # fmt: skip
        if self.estimator not in get_args(Estimator):
            raise ValueError(
                f"SampledDivergence(estimator={self.estimator!r}): expected {', '.join(get_args(Estimator))}"
            )

    def needs(self) -> tuple[str, ...]:
        return (f"{self.teacher}.sampled",)

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        assert student.sampled is not None
        p, q = student.sampled, step.views[self.teacher].sampled
        if self.estimator == "abs":
            return above(p, q) * (p - q)
        if self.estimator == "k2":
            return (p - q).square() / 2
        gap = (q - p).clamp(max=LOG_RATIO_LIMIT)
        return gap.exp() - 1 - gap


# ---------------------------------------------------------------------------------------------------------------------
# The whole distribution, or a support of it


@dataclass(frozen=True, repr=False)
class Divergence(Value):
    """A divergence between student and teacher at every position, differentiated through the student.

    `kind`: see `opdkit.divergences`; `mix` is always the teacher's share. On a view with support Full the whole
    vocabulary is compared. On TopK, `tail` says what happens outside the candidates. "bucket" lumps the rest into one
    more outcome: a lower bound of the full divergence, 0 only where both agree on it. "renormalise" forgets the rest:
    0 at one candidate. "raw" adds up the candidates' summands with full-vocabulary log-probs and nothing for the rest
    (verl's form): raw forward KL pushes mass into the list even where student and teacher agree, and raw reverse KL is
    minimised by moving mass out of it.

    `entry_max` (nats) limits every outcome's summand, as OPSD does (2601.18734); an outcome above it has gradient 0.
    `row_max` (nats) limits a row's value, as verl's loss_max_clamp does from above; a row above it has gradient 0.
    """

    kind: Kind = "reverse_kl"
    mix: float = 0.5
    alpha: float = 0.5
    teacher: str = "teacher"
    tail: Tail = "bucket"
    row_max: float | None = None
    entry_max: float | None = None
    signal_rank = 0
    own_samples = False

    def __post_init__(self) -> None:
        check_divergence(self.kind, self.mix, self.alpha)
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail is {self.tail!r}; expected one of {', '.join(get_args(Tail))}")
        for name, limit in (("row_max", self.row_max), ("entry_max", self.entry_max)):
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} = {limit} nats must be positive; None is no limit")

    def needs(self) -> tuple[str, ...]:
        return (f"{self.teacher}.distribution",)

    def over(self, step: Step) -> Over:
        return "candidates" if step.views[self.teacher].full is None else "full"

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]:
        found = step.views[self.teacher].candidates
        assert found is not None and student.candidates is not None
        p = on_support(student.candidates, student.tail, found.valid, self.tail)
        q = on_support(found.teacher, found.teacher_tail, found.valid, self.tail)
        value = entries(LogProbs(p), LogProbs(q), self.kind, self.mix, self.alpha).value
        row = (value if self.entry_max is None else value.clamp(max=self.entry_max)).sum(-1)
        return row if self.row_max is None else row.clamp(max=self.row_max)

    def full(self, p: LogProbs, q: LogProbs | None) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
        """Value and gradient with respect to the student's logits.

        With s_j = dD / dlog p_j the logit gradient is s_j - p_j sum_i s_i.
        """
        assert q is not None
        found = entries(p, q, self.kind, self.mix, self.alpha)
        value, slope = found.value, found.slope
        if self.entry_max is not None:
            slope = (slope - found.free * found.mass).masked_fill_(value > self.entry_max, 0.0)
            value = value.clamp(max=self.entry_max)
        row = value.sum(-1)
        total = row if slope is value else slope.sum(-1)
        gradient = torch.addcmul(slope, found.mass, total[:, None], value=-1)
        if self.row_max is None:
            return row, gradient
        return row.clamp(max=self.row_max), gradient.masked_fill_((row > self.row_max)[:, None], 0.0)


@dataclass(frozen=True, repr=False)
class Entropy(Value):
    """- H(p) over the whole vocabulary: a term with coefficient c > 0 is an entropy bonus of c. It has no teacher."""

    teacher = None
    signal_rank = 0
    own_samples = False

    def needs(self) -> tuple[str, ...]:
        return ()

    def over(self, step: Step) -> Over:
        return "full"

    def full(self, p: LogProbs, q: LogProbs | None) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
        """Value and gradient p_j (log p_j + H) with respect to the student's logits."""
        mass = p.mass
        summands = mass * p.log
        row = summands.sum(-1)
        return row, torch.addcmul(summands, mass, row[:, None], value=-1)
