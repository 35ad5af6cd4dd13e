"""Prepare steps: what happens to judged rollouts before they are scored, such as balancing or shaping their rewards."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opdkit.rollouts.rollout import Rollout


@dataclass(frozen=True)
class Batch:
    """What a prepare step may know besides the rollouts."""

    limit: int  # response tokens allowed in this step
    seed: int  # for random choices; depends on the run's seed, the step and the source


@runtime_checkable
class Prepare(Protocol):
    """A value: list of rollouts -> list of rollouts. Groups stay side by side; a rollout that is left out is not scored."""

    def needs(self) -> tuple[str, ...]:
        """What it reads: "rollouts.reward", "rollouts.correct" or "rollouts.group"."""
        ...

    def check(self, shortest: int) -> None:
        """Raise RecipeError where it makes no sense in a run whose response limit may fall to `shortest` tokens."""
        ...

    def __call__(self, rollouts: list[Rollout], batch: Batch) -> list[Rollout]: ...
