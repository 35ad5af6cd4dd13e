"""The `sums` language: a chain of additions and subtractions, and two ways of working it out in writing.

Both formats write the same cells, one for each step and column, and differ in their order and marks. A cell is the
carry out of the column (`0`, `1`, or `-` for a borrow) and the digit; the last column is written as the number that
it is. For 47+85-36 the cells are 12 13 (7+5 = 12, 4+8+1 = 13) and -6 09 (2-6 borrows and leaves 6, 13-3-1 = 9):

    a   by steps    `1213 -609=96`    all columns of a step, units first, then the next step
    b   by columns  `u12-6t1309=96`   the units of all steps, then the tens, then the hundreds

The carry comes before the digit on purpose: whether a column overflows is learned early, and given that, the digit is
easy. Without it small models spend hundreds of steps without any progress on the digits.

Left out: negative totals, other operators, numbers of different length.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

Format = Literal["a", "b"]
FORMATS: tuple[Format, ...] = ("a", "b")
COLUMNS = "uth"  # units, tens, hundreds


@dataclass(frozen=True)
class Chain:
    """Signed terms of one sum: (47, 85, -36) is 47+85-36. No running total is negative."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question as text, such as `47+85-36=`."""
        return "".join(f"{term:+d}" for term in self.terms).removeprefix("+") + "="

    @property
    def columns(self) -> int:
        """Digits of the longest term."""
        return len(str(max(abs(term) for term in self.terms)))

    @property
    def answer(self) -> str:
        return str(sum(self.terms))


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
    totals = list(accumulate(chain.terms))
    steps = [_cells(total, term, chain.columns) for total, term in zip(totals, chain.terms[1:], strict=False)]
    if layout == "a":
        return " ".join("".join(cells) for cells in steps) + "=" + chain.answer
    marked = [mark + "".join(cells) for mark, cells in zip(COLUMNS, zip(*steps, strict=True), strict=False)]
    return "".join(marked) + "=" + chain.answer


def _cells(total: int, term: int, columns: int) -> list[str]:
    """What one step writes in each column, units first: two characters each."""
    sign = 1 if term >= 0 else -1
    cells = []
    for base in (10**column for column in range(1, columns)):
        carry = (total % base + sign * (abs(term) % base)) // base
        cells.append({-1: "-", 0: "0", 1: "1"}[carry] + str((total + term) // (base // 10) % 10))
    return [*cells, str((total + term) // 10 ** (columns - 1)).zfill(2)]


def final_answer(response: str) -> str:
    """What stands after the last `=` (the whole response when there is none), without surrounding space."""
    return response.rpartition("=")[2].strip()
