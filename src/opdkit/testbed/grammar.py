"""The `sums` language: a chain of additions and subtractions, and two ways of working it out in writing.

Both formats write the same digits, those of the running totals, units first and padded to one width; they differ in
the order and the marks. For 47+85-36 the totals are 132 and 96:

    a   by rows     `231 690=96`       every running total in turn
    b   by columns  `u26t39h10=96`     units of all totals, then tens, then hundreds

Left out: negative totals, other operators, numbers of different length.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

Format = Literal["a", "b"]
FORMATS: tuple[Format, ...] = ("a", "b")
COLUMNS = "uthk"  # units, tens, hundreds, thousands


@dataclass(frozen=True)
class Chain:
    """Signed terms of one sum: (47, 85, -36) is 47+85-36. No running total is negative."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question as text, such as `47+85-36=`."""
        return "".join(f"{term:+d}" for term in self.terms).removeprefix("+") + "="

    @property
    def totals(self) -> tuple[int, ...]:
        """The running totals after the second and each later term."""
        return tuple(accumulate(self.terms))[1:]

    @property
    def width(self) -> int:
        """Columns of the written totals: one more than the digits of the longest term."""
        return len(str(max(abs(term) for term in self.terms))) + 1

    @property
    def answer(self) -> str:
        return str(self.totals[-1])


def parse(prompt: str) -> Chain:
    """The chain that a prompt asks for; the inverse of `Chain.prompt`."""
    return Chain(tuple(int(term) for term in re.findall(r"[+-]?\d+", prompt)))


def draw(random: Random, terms: int, digits: int) -> Chain:
    """A chain of `terms` numbers of exactly `digits` digits; signs are even odds where the total allows both."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    drawn = [random.randint(low, high)]
    for _ in range(terms - 1):
        term = random.randint(low, high)
        minus = random.random() < 0.5 and term <= sum(drawn)
        drawn.append(-term if minus else term)
    return Chain(tuple(drawn))


def solution(chain: Chain, layout: Format) -> str:
    """The written solution in a format, ending in `=` and the answer in ordinary notation."""
    rows = [str(total).zfill(chain.width)[::-1] for total in chain.totals]
    if layout == "a":
        return " ".join(rows) + "=" + chain.answer
    columns = ["".join(digits) for digits in zip(*rows, strict=True)]
    return "".join(mark + column for mark, column in zip(COLUMNS, columns, strict=False)) + "=" + chain.answer


def final_answer(response: str) -> str:
    """What stands after the last `=` (the whole response when there is none), without surrounding space."""
    return response.rpartition("=")[2].strip()
