"""A controller of the response limit: longer while enough rollouts use it up reliably, shorter after failures.

Left out: limits per prompt or per domain, and the kind of reliability, which is a piece (`opdkit.drift`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.controllers import State
from opdkit.errors import MethodError, RecipeError
from opdkit.pieces import Piece, flat
from opdkit.serialise import register
from opdkit.step import Step
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class LengthControl(Value):
    """Moves the response limit M between batches (arXiv:2605.07804 Algorithm 1, as released). All lengths in tokens.

    E = a rollout's tokens on which `of` is positive; hit = the share of rollouts with E >= max(least, M - margin). With
    hit >= `hits`, M grows by `step` and the misses are forgotten; else it is a miss, and `patience` of them in a row
    shrink M by `step`. M stays between `least` and `most`; most = None is sampling.max_new_tokens. A reliable rollout that
    ends early counts as a miss: with short answers M falls to `least`.
    """

    of: Piece
    start: int = 1024
    least: int = 1024
    most: int | None = None
    step: int = 100
    margin: int = 100
    hits: float = 0.1
    patience: int = 3
    name: str = "length"
    on: str = "policy"
    when: Literal["after"] = "after"

    def __post_init__(self) -> None:
        flat(self.of, "LengthControl")
        if not 1 <= self.least <= (self.least if self.most is None else self.most):
            raise MethodError(
                f"LengthControl(least={self.least}, most={self.most}): expected 1 <= least <= most tokens"
            )
        if min(self.start, self.step, self.patience) < 1 or self.margin < 0:
            raise MethodError(f"LengthControl(start={self.start}, step={self.step}, patience={self.patience}, "
                              f"margin={self.margin}): expected 1 or more, and a margin of 0 or more tokens")  # fmt: skip
        if not 0 < self.hits <= 1:
            raise MethodError(
                f"LengthControl(hits={self.hits}): expected a share of the rollouts, above 0 and at most 1"
            )

    def check(self, window: int) -> None:
        """Raise RecipeError when it could not move the limit of runs whose sampling.max_new_tokens is `window`."""
        if self.most is not None and self.most > window:
            raise RecipeError(f"the method lets the response limit grow to {self.most} tokens, but sampling.max_new_tokens is "
                              f"{window}; raise that, or lower or drop `most`")  # fmt: skip
        if self.least >= (self.most or window):
            raise RecipeError(f"the method keeps the response limit at {self.least} tokens or more, and at most "
                              f"{self.most or window} are allowed, so it could never move; lower `least`, raise "
                              "sampling.max_new_tokens, or leave out the length control")  # fmt: skip

    def shortest(self, window: int) -> int:
        return min(self.least, window)

    def needs(self) -> tuple[str, ...]:
        return tuple(need for _, need in self.of.needs)

    def init(self) -> State:
        start = max(self.start, self.least)
        limit = start if self.most is None else min(start, self.most)
        return {"limit": limit, "misses": 0, "hits": 0.0, "effective": 0.0}

    def measure(self, step: Step) -> Float[Tensor, " n"]:
        """(E, sampling.max_new_tokens) of every rollout, pair after pair: the state does not know the latter."""
        effective = step.layout.seq_sum((self.of(step) > 0).double())
        return torch.stack([effective, torch.full_like(effective, step.horizon)], 1).flatten()

    def update(self, state: State, values: Float[Tensor, " n"]) -> State:
        """One step of the limit; with the share of hits and the mean E that it saw."""
        effective, window = values.double().reshape(-1, 2).unbind(1)
        most = min(int(window[0]), self.most or int(window[0]))
        limit, least = min(state["limit"], most), min(self.least, most)
        reached = int((effective >= max(least, limit - self.margin)).sum())
        share = reached / effective.shape[0]
        misses = state["misses"]
        if share >= self.hits:
            limit, misses = min(limit + self.step, most), 0
        elif (misses := misses + 1) >= self.patience:
            limit, misses = max(limit - self.step, least), 0
        return {"limit": limit, "misses": misses, "hits": share, "effective": float(effective.mean())}

    def response_limit(self, state: Mapping[str, Any]) -> int:
        return int(state["limit"])

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """The next step's limit, this step's share of hits and mean effective length (tokens)."""
        return {"limit": float(state["limit"]), "hits": state["hits"], "effective": state["effective"]}


register(LengthControl)
