"""The environment `calculator`: exact arithmetic on one expression a call, with errors that say what to change.

Numbers are fractions, so `1/3*3` is 1. Left out: names, functions, and numbers of more than 60 digits.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import log10
from typing import Any

from opdkit.errors import RecipeError
from opdkit.tasks.environments import Observation
from opdkit.tasks.problem import Message, Problem

LONGEST = 200  # characters of an expression
DIGITS = 60  # of a result's numerator and denominator
ALLOWED = "0123456789.+-*/%() "
SCHEMA = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "numbers with + - * / // % ** and parentheses, as 3*(4+5)",
                }
            },
            "required": ["expression"],
        },
    },
}


class CalculationError(ValueError):
    """An expression that has no value here; its text is for the model."""


@dataclass(frozen=True)
class Calculator:
    """`operations`: how many a call may have, so that longer expressions take several turns; None = any number."""

    operations: int | None = None

    def __post_init__(self) -> None:
        if self.operations is not None and (not isinstance(self.operations, int) or self.operations < 1):
            raise RecipeError(f"calculator: operations = {self.operations!r}, expected a number from 1 on, or null")

    @property
    def tools(self) -> tuple[Message, ...]:
        return (SCHEMA,)

    def start(self, problem: Problem) -> "Calculator":
        """Nothing is remembered between calls: the environment is its own session."""
        return self

    def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        expression = arguments.get("expression")
        if not isinstance(expression, str):
            return Observation(f"expression is {expression!r}, expected a string such as '3*(4+5)'", error=True)
        try:
            return Observation(show(calculate(expression, self.operations)))
        except CalculationError as error:
            return Observation(str(error), error=True)

    def close(self) -> None:
        """Nothing to free."""


def calculate(text: str, operations: int | None = None) -> Fraction:
    """The exact value of an expression. Raises CalculationError with what is wrong and where."""
    if len(text) > LONGEST:
        raise CalculationError(f"the expression has {len(text)} characters, at most {LONGEST} are allowed")
    if not text.strip():
        raise CalculationError("the expression is empty")
    if (at := next((i for i, c in enumerate(text) if c not in ALLOWED), None)) is not None:
        raise CalculationError(f"unknown symbol {text[at]!r} at position {at + 1}; use numbers and + - * / // % ** ( )")
    _check_parentheses(text)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip())  # Python refuses leading zeros
    if (found := re.search(r"[\d.)]\s*\(|\)\s*[\d.]|\d\s+[\d.]", plain)) is not None:
        raise CalculationError(f"an operator is missing in '{found[0]}'")
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise CalculationError("the expression cannot be read: a number or an operator is missing") from error
    count = sum(isinstance(node, ast.BinOp) for node in ast.walk(tree))
    if operations is not None and count > operations:
        raise CalculationError(f"{count} operations in one call, at most {operations} allowed")
    return _value(tree)


def show(value: Fraction) -> str:
    """A value as text: whole numbers whole, others with up to ten significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _check_parentheses(text: str) -> None:
    opened = []
    for at, character in enumerate(text, 1):
        if character == "(":
            opened.append(at)
        elif character == ")":
            if not opened:
                raise CalculationError(f"unbalanced parentheses: the ')' at position {at} closes nothing")
            opened.pop()
    if opened:
        raise CalculationError(f"unbalanced parentheses: the '(' at position {opened[-1]} is never closed")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return _bounded(Fraction(ast.unparse(node)))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left), _value(right)))
    raise CalculationError("only numbers and + - * / // % ** ( ) are allowed")


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**DIGITS:
        raise CalculationError(f"the result has more than {DIGITS} digits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculationError("powers need a whole exponent")
    if base == 0 and exponent < 0:
        raise CalculationError("division by zero")
    if abs(exponent) * log10(max(abs(base.numerator), base.denominator)) > DIGITS:
        raise CalculationError(f"the result has more than {DIGITS} digits")
    return Fraction(base**exponent.numerator)


def _divided(how: Callable[[Any, Any], Any]) -> Callable[[Fraction, Fraction], Fraction]:
    def divide(a: Fraction, b: Fraction) -> Fraction:
        if b == 0:
            raise CalculationError("division by zero")
        return Fraction(how(a, b))

    return divide


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divided(operator.truediv),
    ast.FloorDiv: _divided(operator.floordiv),
    ast.Mod: _divided(operator.mod),
    ast.Pow: _power,
}
