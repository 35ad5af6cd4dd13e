"""Online balancing: as many correct as incorrect rollouts of a prompt are trained on (2605.03677, Uni-OPD).

A prepare step. What it drops leaves the batch before it is scored and counts in no mean (in the released code it stays in
the denominator of the loss). Left out: a scope over several processes; with scope batch each balances its own rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isinf
from random import Random
from typing import Literal

from opdkit.errors import MethodError
from opdkit.prepare import Batch
from opdkit.rollouts.rollout import Rollout
from opdkit.serialise import register
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class Balance(Value):
    """Drop rollouts at random until correct : incorrect is `ratio` : 1, in every prompt's group or in the whole batch.

    The side that is too large shrinks; one without the other stays as it is. ratio 0 keeps incorrect rollouts only,
    infinity (.inf in YAML) correct ones only; where that leaves nothing of a whole batch, the step gets weight 0. A rollout
    whose verdict is not known counts as incorrect. The choice depends on the run's seed, the step and the problem's id.
    """

    ratio: float = 1.0
    scope: Literal["group", "batch"] = "group"

    def __post_init__(self) -> None:
        if not self.ratio >= 0:
            raise MethodError(f"{self}: expected the number of correct rollouts for each incorrect one, 0 or more")

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.correct", f"rollouts.{self.scope}")

    def check(self, shortest: int) -> None:
        """Lengths do not matter to it."""

    def __call__(self, rollouts: list[Rollout], batch: Batch) -> list[Rollout]:
        groups = [list(g) for _, g in groupby(rollouts, key=lambda r: r.group)] if self.scope == "group" else [rollouts]
        return [kept for group in groups for kept in self._balanced(group, batch.seed)]

    def _balanced(self, group: Sequence[Rollout], seed: int) -> list[Rollout]:
        right = [i for i, r in enumerate(group) if r.correct]
        wrong = [i for i, r in enumerate(group) if not r.correct]
        few_right, few_wrong = self.sizes(len(right), len(wrong))
        who = group[0].problem.id if self.scope == "group" and group else "batch"
        draw = Random(f"opdkit balance {seed} {who}")
        kept = {*draw.sample(right, few_right), *draw.sample(wrong, few_wrong)}
        return [r for i, r in enumerate(group) if i in kept]

    def sizes(self, right: int, wrong: int) -> tuple[int, int]:
        """How many of so many correct and incorrect rollouts stay."""
        if self.ratio == 0 or isinf(self.ratio):
            return (0, wrong) if self.ratio == 0 else (right, 0)
        if right and wrong:
            if right > int(wrong * self.ratio) >= 1:
                return int(wrong * self.ratio), wrong
            if wrong > int(right / self.ratio) >= 1:
                return right, int(right / self.ratio)
        return right, wrong


register(Balance)
