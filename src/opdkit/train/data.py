"""The order in which a run draws its prompts: endless, shuffled anew every epoch, and restored exactly.

Left out: loading prompts (`opdkit.tasks`) and choosing them by difficulty (a curriculum is method state).
"""

import random
from typing import Any

from opdkit.errors import DataError, RunError


class PromptOrder:
    """Indices of `n` problems in an order that depends on (seed, epoch) alone and touches no global random state.

    Every epoch is a permutation, so each problem comes once before any comes again. `take(k)` may cross the end of an
    epoch: with k > n, or at such a crossing, one call can return a problem twice.

    Raises DataError when there is no problem.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise DataError("the task has no training problem; a run needs at least one")
        self.n, self.seed = n, seed
        self.drawn = 0  # problems handed out since the start of the run
        self._epoch, self._permutation = 0, _permutation(n, seed, 0)

    def take(self, k: int) -> list[int]:
        """The next k indices, each in [0, n)."""
        return [self._next() for _ in range(k)]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for the checkpoint."""
        return {"n": self.n, "seed": self.seed, "drawn": self.drawn}

    @classmethod
    def restore(cls, n: int, seed: int, state: dict[str, Any]) -> "PromptOrder":
        """The order that goes on where `state` was taken.

        Raises RunError when the number of problems or the seed is not the one of the checkpoint.
        """
        for name, given in (("n", n), ("seed", seed)):
            if state.get(name) != given:
                what = {"n": "training problems", "seed": "as seed"}[name]
                raise RunError(
                    f"the checkpoint was written with {state.get(name)} {what}, this run has {given}; "
                    "resume with the same task and seed, or start a new run with another output=..."
                )
        order = cls(n, seed)
        order.drawn = state["drawn"]
        return order

    def _next(self) -> int:
        epoch, place = divmod(self.drawn, self.n)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, _permutation(self.n, self.seed, epoch)
        self.drawn += 1
        return self._permutation[place]


def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    # Sorting by random() and not shuffle(): Python promises the same random() for the same seed in every version.
    draw = random.Random(f"opdkit prompts {seed} {epoch}").random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)
