"""Supports: the token ids on which student and teacher are compared at one position.

Axes: N rows, k size of a top-k list, K support size (k or 2k).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opdkit.values import Value

Of = Literal["student", "teacher", "union", "intersection", "difference"]


@dataclass(frozen=True, repr=False)
class Sampled(Value):
    """The sampled token only (K = 1)."""


@dataclass(frozen=True, repr=False)
class TopK(Value):
    """The k most probable ids of student or teacher, or a set made of both lists (2604.13016, candidate sets).

    `difference` is the symmetric difference: ids that exactly one of the two lists holds.
    """

    k: int
    of: Of = "student"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK(k={self.k}): k must be at least 1")
        if self.of not in ("student", "teacher", "union", "intersection", "difference"):
            raise ValueError(f"TopK(of={self.of!r}): expected student, teacher, union, intersection or difference")


@dataclass(frozen=True, repr=False)
class Full(Value):
    """The whole vocabulary, formed lazily from hidden states."""


Support = Sampled | TopK | Full


def candidates(
    of: Of, student: Int[Tensor, "N ks"], teacher: Int[Tensor, "N kt"]
) -> tuple[Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """Ids of the candidate set and which columns count: an id of both lists counts once, in the student's column.

    K = k, or 2k (student's list, then teacher's) for `union` and `difference`.
    """
    if of == "student":
        return student, torch.ones_like(student, dtype=torch.bool)
    if of == "teacher":
        return teacher, torch.ones_like(teacher, dtype=torch.bool)
    in_teacher = (student[:, :, None] == teacher[:, None, :]).any(-1)
    if of == "intersection":
        return student, in_teacher
    in_student = (teacher[:, :, None] == student[:, None, :]).any(-1)
    student_valid = torch.ones_like(in_teacher) if of == "union" else ~in_teacher
    return torch.cat([student, teacher], 1), torch.cat([student_valid, ~in_student], 1)
