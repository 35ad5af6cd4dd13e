"""What losses read and what they offer: the row-wise interface between the head and `opdkit.losses`.

Axes: n rows, K support size, V vocabulary. Log-probabilities and values in nats. Left out: the losses themselves.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from opdkit.divergences import LogProbs
from opdkit.step import Step

Over = Literal["sampled", "candidates", "full"]


@dataclass(frozen=True)
class StudentRows:
    """The current student's log-probs on n rows, normalised over the full vocabulary, with gradient."""

    sampled: Float[Tensor, " n"] | None
    candidates: Float[Tensor, "n K"] | None
    tail: Float[Tensor, " n"] | None


@runtime_checkable
class Loss(Protocol):
    """What every loss offers.

    `teacher` is the view it compares with, if any. `signal_rank` is 0 for no signal, 1 for [n] and 2 for [n, K].
    `own_samples`: its expectation is one over tokens that the student samples, so it is wrong on any others.
    """

    @property
    def teacher(self) -> str | None: ...

    @property
    def signal_rank(self) -> int: ...

    @property
    def own_samples(self) -> bool: ...

    def needs(self) -> tuple[str, ...]: ...

    def over(self, step: Step) -> Over: ...


@runtime_checkable
class SparseLoss(Protocol):
    """What a loss over the sampled token or over candidates adds: its value, differentiable in the student's rows."""

    def rows(self, student: StudentRows, step: Step, signal: Tensor | None) -> Float[Tensor, " n"]: ...


@runtime_checkable
class FullLoss(Protocol):
    """What a loss over the whole row adds: value and gradient with respect to the student's logits.

    `p`, `q` are rows of student and teacher, which other terms read as well; `q` is None for a loss without a teacher.
    """

    def full(self, p: LogProbs, q: LogProbs | None) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]: ...


@dataclass(frozen=True)
class RowTerm:
    """One term on N rows: a row-wise loss, the step restricted to these rows, its signal and a coefficient per row."""

    loss: Loss
    step: Step
    signal: Float[Tensor, " N"] | Float[Tensor, "N K"] | None
    coef: Float[Tensor, " N"]  # term coefficient x reduction x weight
