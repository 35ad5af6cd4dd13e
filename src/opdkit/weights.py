"""Weights: how much each token counts. Pure functions Step -> [N], never negative.

A weight of 0 removes the token from its term's count; a small weight does not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.pieces import piece
from opdkit.step import Step


@piece()
def ones(step: Step) -> Float[Tensor, " N"]:
    """Every trained token counts the same."""
    return (
        torch.ones_like(step.views["student"].sampled) if "student" in step.views else torch.ones(step.tokens.shape[0])
    )


@piece()
def first_tokens(step: Step, *, n: int) -> Float[Tensor, " N"]:
    """1 for the first n trained tokens of each sequence, 0 after them."""
    return (step.layout.position() < n).to(torch.float32)


@piece("{teacher}.sampled")
def confidence(step: Step, *, teacher: str = "teacher") -> Float[Tensor, " N"]:
    """The teacher's probability of the sampled token."""
    return step.views[teacher].sampled.exp()
