"""The `calculator` task: nested expressions that are worked out with a tool, one operation a call.

`((7+5)*3)-8=` is solved in the text protocol of `rollouts.tools`: the model writes `CALL 7+5`, reads `= 12`, and so on from
the inside out, left before right; the last line is the number alone. With `slips` the solutions to imitate hold malformed
calls, each with the error that the calculator answers, before the right one: data for a clumsy caller. The problems and
their verifier are the same whatever `slips` is. Left out: division, so that all values are whole.
"""

from copy import copy
from dataclasses import dataclass
from random import Random

from pydantic import Field

from opdkit.config import Section
from opdkit.tasks.calculator import Calculator
from opdkit.tasks.problem import Problem, Trace, Verdict

CALCULATOR = Calculator(operations=1)


class CalculatorSettings(Section):
    """Settings of `calculator`."""

    operations: int = Field(3, ge=1, le=6, description="operations of an expression")
    digits: int = Field(1, ge=1, le=3, description="digits of a number")
    slips: float = Field(0.0, ge=0, lt=1, description="share of malformed calls in the solutions to imitate")


@dataclass(frozen=True)
class Node:
    """An operation on two numbers or operations."""

    sign: str
    left: "Node | int"
    right: "Node | int"


def draw_expression(settings: CalculatorSettings, random: Random) -> Problem:
    """A random tree of operations; `metadata` holds its calls in order, each with its result, and with `slips` the malformed
    attempts at each of them, as (call, error)."""
    tree = _tree(settings.operations, settings.digits, random)
    calls: list[tuple[str, str]] = []
    answer = _solve(tree, calls)
    metadata: dict[str, object] = {"calls": calls}
    if settings.slips:
        own = copy(random)  # so that a seed draws the same expressions whatever `slips` is
        metadata["slips"] = [_attempts(call, settings.slips, own) for call, _ in calls]
    return Problem(id="", prompt=f"{_text(tree)}=", answer=str(answer), domain="calculator", metadata=metadata)


def solution(problem: Problem) -> Trace:
    """The response to imitate: every call with its result, malformed attempts with their errors before it, then the answer."""
    calls = problem.metadata["calls"]
    parts: list[tuple[str, bool]] = []
    for (call, result), slips in zip(calls, problem.metadata.get("slips", [[]] * len(calls)), strict=True):
        for slip, error in slips:
            parts += [(f"CALL {slip}\n", True), (f"ERROR {error}\n", False)]
        parts += [(f"CALL {call}\n", True), (f"= {result}\n", False)]
    return Trace([*parts, (str(problem.answer), True)])


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


def _attempts(call: str, slips: float, random: Random) -> list[tuple[str, str]]:
    """Malformed forms of a call, each with the calculator's answer; another follows with probability `slips`."""
    found = []
    while random.random() < slips:
        slip = _malformed(call, random)
        found.append((slip, CALCULATOR.call("calculator", {"expression": slip}).text))
    return found


def _malformed(call: str, random: Random) -> str:
    """A parenthesis too many, no second number, no operator, or an operation too many."""
    at = next(i for i, c in enumerate(call) if i and c in "+-*")  # behind the sign of the first number
    more = f"{call}{random.choice('+-*')}{random.randrange(10)}"
    return random.choice([f"({call}", call[: at + 1], f"{call[:at]} {call[at + 1 :]}", more])
