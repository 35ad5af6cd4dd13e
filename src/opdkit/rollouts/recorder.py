"""What is recorded while rows decode together, handed back row by row.

Axes: r rows of one addition, of R rows in all.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from opdkit.rollouts.draw import Draw


class Recorder:
    """Collects values of some rows at a time, such as those of every decoding step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, ...]] = []

    def add(self, rows: Int[Tensor, " r"], *values: Tensor) -> None:
        self.steps.append((rows, *values))

    def newest(self, count: int) -> list[tuple[Tensor, Draw]]:
        """What was drawn at the last `count` steps, and for which rows; for a recorder of draws."""
        return [(rows, Draw(*values[: len(Draw._fields)])) for rows, *values in self.steps[-count:]]

    def per_row(self, count: int) -> list[tuple[Tensor, ...]]:
        """The values of each of `count` rows, in the order of time. New tensors, also of what inference mode made."""
        rows, *values = (torch.cat(column) for column in zip(*self.steps, strict=True))
        order = torch.argsort(rows, stable=True)  # steps are in time order, so positions stay in order
        lengths = torch.bincount(rows, minlength=count).tolist()
        return list(zip(*(value[order].split(lengths) for value in values), strict=True))
