"""Reward shaping: prepare steps that change the rewards of judged rollouts. Verdicts (`correct`) stay as they are.

They run in the order in which a method lists them. Left out: shaping by length within a group, and filtering (a prepare step
that drops rollouts is `opdkit.rollouts.balance`).
"""

from dataclasses import dataclass, replace
from itertools import groupby

from opdkit.errors import MethodError, RecipeError
from opdkit.prepare import Batch, Prepare
from opdkit.rollouts.rollout import Rollout
from opdkit.serialise import register
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class RewardScale(Value):
    """Maps a reward of 0 to `low` and of 1 to `high`, linearly: the defaults make +1 and -1 of right and wrong."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.low, self.high) == (0.0, 1.0):
            raise MethodError(f"{self}: expected low < high, other than 0 and 1, which changes nothing")

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.reward",)

    def check(self, shortest: int) -> None:
        """Lengths do not matter to it."""

    def __call__(self, rollouts: list[Rollout], batch: Batch) -> list[Rollout]:
        return [replace(r, reward=self.low + (self.high - self.low) * reward(r)) for r in rollouts]


@dataclass(frozen=True, repr=False)
class CallBonus(Value):
    """Adds `each` to the reward of an incorrect response for every tool call that it made, at most `most` in all.

    With rewards of -1 for wrong the defaults are those of 2605.07725's code, min(-0.6, -1 + 0.1 calls). A call is a block of
    tool text inside the response (`tool_calls`).
    """

    each: float = 0.1
    most: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.each <= self.most:
            raise MethodError(f"{self}: expected 0 < each <= most, in units of the reward")

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.reward", "rollouts.correct")

    def check(self, shortest: int) -> None:
        """Lengths do not matter to it."""

    def __call__(self, rollouts: list[Rollout], batch: Batch) -> list[Rollout]:
        return [r if r.correct else replace(r, reward=reward(r) + self.bonus(tool_calls(r))) for r in rollouts]

    def bonus(self, calls: int) -> float:
        return min(self.each * calls, self.most)


@dataclass(frozen=True, repr=False)
class Overlong(Value):
    """A penalty that grows in the last `buffer` tokens before the length limit, from 0 to `factor` (2503.14476 Eq. 13).

    reward - factor x clip((length - (limit - buffer)) / buffer, 0, 1). All lengths in tokens; tool text counts, as it does for
    the limit. `limit` None is the step's response limit (sampling.max_new_tokens, or less where a controller lowers it).
    """

    buffer: int
    factor: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.factor <= 0 or (self.limit is not None and self.limit < self.buffer):
            raise MethodError(
                f"{self}: expected a buffer of 1 token or more, a factor above 0, and no limit below the buffer"
            )

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.reward",)

    def check(self, shortest: int) -> None:
        """Raise RecipeError where every response would be penalised."""
        limit = shortest if self.limit is None else self.limit
        if limit < self.buffer:
            raise RecipeError(f"{self}: the buffer is longer than the response limit of {limit} tokens, so every response "
                              "would be penalised; lower the buffer, or raise sampling.max_new_tokens (and `least` of a "
                              "length control)")  # fmt: skip

    def __call__(self, rollouts: list[Rollout], batch: Batch) -> list[Rollout]:
        self.check(batch.limit)
        limit = batch.limit if self.limit is None else self.limit
        return [replace(r, reward=reward(r) - self.penalty(len(r.response_ids), limit)) for r in rollouts]

    def penalty(self, length: int, limit: int) -> float:
        return self.factor * min(max((length - (limit - self.buffer)) / self.buffer, 0.0), 1.0)


def shaping(
    *,
    signed: bool = False,
    call_bonus: float = 0.0,
    call_bonus_most: float = 0.4,
    overlong: int | None = None,
    overlong_factor: float = 1.0,
) -> tuple[Prepare, ...]:
    """The prepare steps of a method's arguments, in the order of 2605.07725: scale, bonus, length. Nothing is on by default.

    Raises ValueError for an argument that has no effect without another one.
    """
    if not call_bonus and call_bonus_most != 0.4:
        raise ValueError(f"call_bonus_most = {call_bonus_most} has no effect without call_bonus; remove it")
    if overlong is None and overlong_factor != 1.0:
        raise ValueError(f"overlong_factor = {overlong_factor} has no effect without overlong; give a buffer in tokens")
    found: list[Prepare] = [RewardScale()] if signed else []
    found += [CallBonus(call_bonus, call_bonus_most)] if call_bonus else []
    return (*found, *([] if overlong is None else [Overlong(overlong, overlong_factor)]))


def reward(rollout: Rollout) -> float:
    """The reward of a judged rollout."""
    assert rollout.reward is not None  # a method whose parts read rewards is refused for a task without verifier
    return rollout.reward


def tool_calls(rollout: Rollout) -> int:
    """Blocks of tool text in a response; several calls that were answered together are one."""
    return sum(not trained for trained, _ in groupby(rollout.trained or ()))


register(RewardScale, CallBonus, Overlong)
