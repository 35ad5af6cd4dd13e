"""Verifiers that compare a response with the problem's answer: `math` and `exact`.

Left out: unit conversion and free-text answers; give the task a verifier of its own for those.
"""

import functools
import re
from collections.abc import Iterable

from opdkit.errors import DataError
from opdkit.rewards.isolated import Isolated
from opdkit.tasks.problem import Problem, Verdict

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:/[1-9]\d*)?")


@functools.cache
def _math() -> Isolated:
    return Isolated(("math",))


def verify_math(problem: Problem, text: str) -> Verdict:
    r"""Correct when math-verify finds the response's last \boxed{...}, else its final expression, equal to the answer.

    A response that cannot be parsed, or not within 5 s, is incorrect. Raises DataError for an answer that cannot be
    parsed, naming the problem. Works in any thread.
    """
    reply = _math()(_answer(problem), text)
    if reply == "gold":
        raise _unparsable(problem)
    return Verdict(reward=float(reply is True), correct=reply is True)


def verify_exact(problem: Problem, text: str) -> Verdict:
    """Correct when the whole response equals the answer, white space at both ends aside."""
    correct = text.strip() == _answer(problem).strip()
    return Verdict(reward=float(correct), correct=correct)


def check_math_answers(problems: Iterable[Problem], at_most: int = 200) -> None:
    """Parse the answers that are not plain numbers, the first `at_most` of them, so that a bad one fails at the start.

    Raises DataError naming the problem.
    """
    for problem in problems:
        if at_most == 0:
            return
        if _NUMBER.fullmatch(_answer(problem).strip()) is None:
            at_most -= 1
            if _math()(_answer(problem), None) is not True:
                raise _unparsable(problem)


def _answer(problem: Problem) -> str:
    if problem.answer is None or not problem.answer.strip():
        raise DataError(f"problem {problem.id} has no answer to compare with; add one, or set task.verifier: none")
    return problem.answer


def _unparsable(problem: Problem) -> DataError:
    return DataError(
        f"problem {problem.id}: the answer {problem.answer!r} is not a number or formula that math-verify can parse; "
        "correct it, or set task.verifier: exact"
    )
