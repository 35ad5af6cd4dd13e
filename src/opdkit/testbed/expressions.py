"""The `calculator` task: nested expressions that are worked out with a tool, one operation a call.

`((7+5)*3)-8=` is solved in the text protocol of `rollouts.tools`: the model writes `CALL 7+5`, reads `= 12`, and so on from
the inside out, left before right; the last line is the number alone. Left out: division, so that all values are whole.
"""

from dataclasses import dataclass
from random import Random

from pydantic import Field

from opdkit.config import Section
from opdkit.tasks.problem import Problem, Trace, Verdict


class CalculatorSettings(Section):
    """Settings of `calculator`."""

    operations: int = Field(3, ge=1, le=6, description="operations of an expression")
    digits: int = Field(1, ge=1, le=3, description="digits of a number")


@dataclass(frozen=True)
class Node:
    """An operation on two numbers or operations."""

    sign: str
    left: "Node | int"
    right: "Node | int"


def draw_expression(settings: CalculatorSettings, random: Random) -> Problem:
    """A random tree of operations; `metadata` holds its calls in order, each with its result."""
    tree = _tree(settings.operations, settings.digits, random)
    calls: list[tuple[str, str]] = []
    answer = _solve(tree, calls)
    metadata = {"calls": calls}
    return Problem(id="", prompt=f"{_text(tree)}=", answer=str(answer), domain="calculator", metadata=metadata)


def solution(problem: Problem) -> Trace:
    """The response to imitate: every call with its result, then the answer."""
    steps = [part for call, result in problem.metadata["calls"]
             for part in ((f"CALL {call}\n", True), (f"= {result}\n", False))]  # fmt: skip
    return Trace([*steps, (str(problem.answer), True)])


def verify_expression(problem: Problem, text: str) -> Verdict:
    """Correct = the last line is the number and nothing else."""
    correct = text.rpartition("\n")[2].strip() == problem.answer
    return Verdict(reward=float(correct), correct=correct)


def _tree(operations: int, digits: int, random: Random) -> Node:
    before = random.randrange(operations)
    sides = [_tree(n, digits, random) if n else random.randrange(10 ** (digits - 1), 10**digits)
             for n in (before, operations - 1 - before)]  # fmt: skip
    return Node(random.choice("+-*"), sides[0], sides[1])


def _text(side: Node | int, inner: bool = False) -> str:
    if isinstance(side, int):
        return str(side)
    text = f"{_text(side.left, True)}{side.sign}{_text(side.right, True)}"
    return f"({text})" if inner else text


def _solve(side: Node | int, calls: list[tuple[str, str]]) -> int:
    if isinstance(side, int):
        return side
    left, right = _solve(side.left, calls), _solve(side.right, calls)
    result = {"+": left + right, "-": left - right, "*": left * right}[side.sign]
    shown = f"({right})" if right < 0 else str(right)
    calls.append((f"{left}{side.sign}{shown}", str(result)))
    return result
