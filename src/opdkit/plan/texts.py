"""Made-up texts with the lengths of a recipe's step: what its passes are counted, rehearsed and timed on.

Prompts are as long as the task's where it is on this machine, else all at the limit. Responses are all at the limit, or,
where a mean is given, end with one probability after every token: lengths are then spread geometrically up to the
limit. Left out: how long a student's responses will be, which nobody knows before the run.

Units: tokens.
"""

import math
import random
from dataclasses import dataclass, replace

from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Problem

PROBLEM = Problem("made-up", "made-up")
ROUNDS = 60  # of a bisection: as fine as a float


@dataclass(frozen=True)
class Lengths:
    """Prompts, the responses' limit, and the probability that a response goes on after a token (1 = up to the limit)."""

    prompts: tuple[int, ...]  # of some of the task's prompts
    limit: int
    goes_on: float = 1.0

    @property
    def longest(self) -> int:
        """The longest prompt."""
        return max(self.prompts)

    @property
    def prompt(self) -> float:
        """The mean prompt."""
        return sum(self.prompts) / len(self.prompts)

    @property
    def response(self) -> float:
        """The mean response."""
        return _mean(self.goes_on, self.limit)

    def alive(self, tokens: int) -> float:
        """The share of responses that have more than so many tokens."""
        return self.goes_on**tokens if tokens < self.limit else 0.0

    def up_to(self, limit: int) -> "Lengths":
        """The same texts with another limit for responses."""
        return replace(self, limit=limit)

    def shrunk(self, factor: float) -> "Lengths":
        """Shorter texts; at least a few tokens of each."""
        prompts = tuple(max(min(p, 4), round(p * factor)) for p in self.prompts)
        limit = max(min(self.limit, 4), round(self.limit * factor))
        response = min(float(limit), max(1.0, self.response * factor))
        return Lengths(prompts, limit, chance(response, limit))

    def cut(self, pieces: int, *, longest: bool = False) -> list["Lengths"]:
        """Responses that are drawn in so many equal pieces: each one's prompt is all that stands before it; `longest`:
        behind the longest responses."""
        pieces = max(1, min(pieces, int(self.response)))
        before, each = self.limit if longest else self.response, self.response / pieces
        found = []
        for k in range(pieces):
            most = max(1, round((k + 1) * self.limit / pieces) - round(k * self.limit / pieces))
            read = tuple(p + round(k * before / pieces) for p in self.prompts)
            found.append(Lengths(read, most, chance(max(1.0, min(each, most)), most)))
        return found

    def texts(self, groups: int, group: int, *, longest: bool = False) -> list[Rollout]:
        """`group` responses to each of some prompts, whose lengths are spread as these are; `longest`: all prompts at the
        longest."""
        shuffled = random.Random(groups)
        prompts = [self.longest if longest else self._spread(i, groups) for i in range(groups)]
        responses = [self._response((i + 0.5) / (groups * group)) for i in range(groups * group)]
        shuffled.shuffle(prompts)
        shuffled.shuffle(responses)
        zeros = {n: (0,) * n for n in {*prompts, *responses}}  # texts of one length share their memory
        ones = {n: (1, *zeros[n][1:]) for n in set(prompts)}
        return [
            Rollout(PROBLEM, (ones if i % 2 else zeros)[length], zeros[n], "", i, "length")  # neighbours differ
            for i, length in enumerate(prompts)
            for n in responses[i * group : (i + 1) * group]
        ]

    def _spread(self, place: int, count: int) -> int:
        return sorted(self.prompts)[int((place + 0.5) / count * len(self.prompts))]

    def _response(self, share: float) -> int:
        """The length that this share of all responses does not exceed."""
        if self.goes_on == 1.0 or share >= 1 - self.alive(self.limit - 1):
            return self.limit
        return min(self.limit, max(1, math.ceil(math.log(1 - share) / math.log(self.goes_on))))


def chance(mean: float, limit: int) -> float:
    """The probability to go on with which responses of at most `limit` tokens have this mean, from 1 to the limit."""
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if _mean(middle, limit) > mean else (middle, high)
    return high if mean < limit else 1.0


def _mean(goes_on: float, limit: int) -> float:
    return float(limit) if goes_on == 1.0 else (1 - goes_on**limit) / (1 - goes_on)
