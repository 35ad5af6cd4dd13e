"""Signals that read the pointwise mutual information of a token and what the teacher was shown (2605.11609).

Axes: N trained tokens, K support size. u = log q(y) - log p(y), `log_ratio()`, is that information in nats where the
teacher is the student itself with more text in its prompt; over a response it adds up to log q(response) - log p(response).

Left out: the "multiplicative" and "no teacher" ablations, whose formulas are not printed.
"""

from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.errors import MethodError
from opdkit.pieces import Piece, piece
from opdkit.step import Step


def _check_phi(of: Piece, mix: float) -> None:
    if not 0 < mix < 1:
        raise MethodError(
            f"phi(mix={mix}): expected the teacher's share of the mixture, strictly between 0 and 1. At 0 it is 0; for "
            "reverse KL take the signal itself"
        )


@piece(check=_check_phi)
def phi(step: Step, *, of: Piece, mix: float = 0.5) -> Tensor:
    """(1 - m) log((1 - m) + m e^u) of a log ratio u, m = `mix`; at 1/2 it is (softplus(u) - log 2) / 2 (2605.11609 Eq. 6).

    phi(0) = 0, increasing, bounded below by (1 - m) log(1 - m), unbounded above. -phi(u) is the policy-gradient signal that
    ascends the generalised JSD of student and teacher, +phi(u) the one that descends it; neither is centred:
    the mean of -phi under the student is (1 - m) KL(p, m q + (1 - m) p).
    """
    u = of(step)
    return (1 - mix) * torch.logaddexp(u + log(mix), torch.full_like(u, log(1 - mix)))


@piece("state.{gate}")
def gated(step: Step, *, of: Piece, gate: str = "gate") -> Tensor:
    """A signal while the controller of that name says "open", else 0. The gate has already seen this step."""
    return of(step) * float(step.state[gate]["open"])


@piece("{view}.informed")
def informed(step: Step, *, view: str = "teacher") -> Float[Tensor, " N"]:
    """Weight: 1 where the view's context had something to show for the rollout, else 0: the token leaves its term's count."""
    scores = step.views[view]
    return torch.ones_like(scores.sampled) if scores.informed is None else scores.informed.to(scores.sampled)
