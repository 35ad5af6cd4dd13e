"""Parts of a method from text, as a recipe writes them: `Term(signal=outcome() + 0.5 * log_ratio())`.

The text has the syntax of Python expressions and is never run as Python: it is parsed, and only what is listed here is
made. That is calls of the engine's own parts by name (pieces, losses, supports, sources, views, terms, controllers,
prepare steps, contexts, hooks), literals, and + - * between pieces and numbers. What a part prints as (`repr`) reads back
as an equal part.

Left out: names that stand for a value, attributes, indices, comparisons, division, and parts of the user's own modules.
"""

import ast
import importlib
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import cache
from math import inf
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from opdkit.catalogue import in_words, method_names
from opdkit.config import nearest
from opdkit.controllers import Controller
from opdkit.errors import MethodError
from opdkit.hooks import Hook
from opdkit.method import Method, Term, View
from opdkit.pieces import Piece, makers, minus, plus, scale, times
from opdkit.prepare import Prepare
from opdkit.serialise import registered
from opdkit.sources import Dataset, OnPolicy, Replay, TeacherSamples
from opdkit.weights import ones

What = Literal["view", "term", "piece", "source", "controller", "prepare step", "hook"]
KINDS: dict[str, tuple[Any, str]] = {  # type, example
    "view": (View, "View('teacher')"),
    "term": (Term, "Term(signal=log_ratio())"),
    "piece": (Piece, "log_ratio()"),
    "source": (OnPolicy | Dataset | TeacherSamples | Replay, "OnPolicy()"),
    "controller": (Controller, "EntropyGate()"),
    "prepare step": (Prepare, "Balance()"),
    "hook": (Hook, "EffOPD()"),
}
PARTS: dict[str, What] = {
    "rollouts": "source",
    "prepare": "prepare step",
    "views": "view",
    "terms": "term",
    "add": "term",
    "controllers": "controller",
    "after_update": "hook",
    "watch": "piece",
}
ALLOWED = (
    "allowed are calls of the engine's parts by name, as in log_ratio(num='teacher'); numbers, 'text', True, False, None "
    "and inf; (1, 2), [1, 2] and {'a': 1} of them; and + - * between pieces and numbers"
)
NUMBERS: dict[type, Callable[[Any, Any], Any]] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
PIECES: dict[type, Callable[..., Piece]] = {ast.Add: plus, ast.Sub: minus, ast.Mult: times}


@cache
def part_names() -> dict[str, Callable[..., Any]]:
    """What a text may call: all parts in the modules that the published methods import."""
    for name in method_names():
        importlib.import_module(f"opdkit.methods.{name}")
    found: dict[str, Callable[..., Any]] = dict(makers())
    return found | {name: made for name, made in registered().items() if made is not Method}


def read(text: str, what: What, where: str) -> Any:
    """The part that `text` describes. Raises MethodError, which names `where`, the character and what is wrong there."""
    reader = _Reader(text, where)
    kind, example = KINDS[what]
    try:
        value = reader.value(reader.tree)
        if isinstance(value, int | float) and what == "piece":
            value = reader.piece(reader.tree, value)
    except RecursionError:
        raise MethodError(f"{where}: {text[:60]!r}... is nested too deeply; {ALLOWED}") from None
    if not fits(value, kind):
        raise MethodError(f"{where}: {text!r} is not a {what}; write something like {example}")
    return value


def read_parts(**texts: list[str] | dict[str, str] | None) -> dict[str, Any]:
    """The parts of a method that are given, by its arguments' names ("add" holds terms), each text read by `read`."""
    found: dict[str, Any] = {}
    for field, given in texts.items():
        what, where = PARTS[field], f"method compose: {field}"
        if isinstance(given, dict):
            found[field] = {name: read(text, what, f"{where}.{name}") for name, text in given.items()}
        elif given is not None:
            found[field] = tuple(read(text, what, f"{where}[{i}]") for i, text in enumerate(given))
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says. An int is no float, a bool no number, and a piece only a Piece."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in inside)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inside)
    if origin is tuple:
        if not isinstance(value, tuple) or (inside[-1] is not ... and len(value) != len(inside)):
            return False
        return all(fits(v, inside[0] if inside[-1] is ... else inside[i]) for i, v in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if isinstance(value, Piece):
        return hint is Piece
    return isinstance(value, origin or hint)


class _Reader:
    """Reads one text; every error names the character, counted from 1."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.source = text.strip().replace("\n", " ")  # one line, so a column is a character
        self.before = len(text) - len(text.lstrip())
        try:
            self.tree = ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            self.stop((error.offset or 1) - 1, f"{error.msg}; {ALLOWED}")
        except (ValueError, MemoryError, RecursionError) as error:
            self.stop(0, f"{error or 'it is nested too deeply'}; {ALLOWED}")

    def stop(self, column: int, message: str) -> NoReturn:
        at = self.source[column : column + 30]
        shown = f"{at}..." if column + 30 < len(self.source) else at or "the end"
        raise MethodError(f"{self.where}, character {self.before + column + 1} ({shown}): {message}") from None

    def fail(self, node: ast.AST, message: str) -> NoReturn:
        column = len(self.source.encode()[: getattr(node, "col_offset", 0)].decode())  # ast counts bytes
        self.stop(column, message)

    def value(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as found):
                return found
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.value(k): self.value(v) for k, v in zip(keys, values, strict=True) if k is not None}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._product(node, -1, self.value(operand))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self._product(node, self.value(left), self.value(right))
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
                return self._sum(node, type(op), self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id=name)):
                return self._call(node, name)
            case ast.Name(id="inf"):
                return inf
            case ast.Name(id=name):
                self._known(node, name)
                self.fail(node, f"'{name}' is not called; write {name}()")
        self.fail(node, f"this is not allowed; {ALLOWED}")

    def piece(self, node: ast.AST, value: Any) -> Piece:
        """A piece as it is; a number as that number at every token."""
        if isinstance(value, Piece):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(node, f"+ - * stand between pieces and numbers, not {value!r}")
        return ones() if value == 1 else scale(float(value), ones())

    def _sum(self, node: ast.AST, op: type, left: Any, right: Any) -> Any:
        if _is_number(left) and _is_number(right):
            return NUMBERS[op](left, right)
        return self._made(node, PIECES[op], self.piece(node, left), self.piece(node, right))

    def _product(self, node: ast.AST, left: Any, right: Any) -> Any:
        if _is_number(left) and _is_number(right):
            return left * right
        for number, other in ((left, right), (right, left)):
            if _is_number(number) and isinstance(other, Piece):
                return self._made(node, lambda factor, part: scale(float(factor), part), number, other)
        return self._made(node, times, self.piece(node, left), self.piece(node, right))

    def _known(self, node: ast.AST, name: str) -> Callable[..., Any]:
        known = part_names()
        if name not in known:
            self.fail(node, f"unknown name '{name}'{nearest(name, list(known))}")
        return known[name]

    def _call(self, node: ast.Call, name: str) -> Any:
        maker = self._known(node, name)
        signature = inspect.signature(maker)
        given: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.fail(node, f"{name}(**...) is not allowed; {ALLOWED}")
            if keyword.arg not in signature.parameters:
                self.fail(
                    keyword, f"{name} has no argument '{keyword.arg}'{nearest(keyword.arg, list(signature.parameters))}"
                )
            if keyword.arg in given:
                self.fail(keyword, f"{name} is given '{keyword.arg}' twice")
            given[keyword.arg] = self.value(keyword.value)
        bound = self._made(node, signature.bind, *map(self.value, node.args), **given)
        for argument, value in bound.arguments.items():
            known = signature.parameters[argument]
            many = known.kind is inspect.Parameter.VAR_POSITIONAL
            if type(value) is int and not fits(value, known.annotation) and fits(1.0, known.annotation):
                value = bound.arguments[argument] = self._made(node, float, value)
            if not all(fits(v, known.annotation) for v in (value if many else (value,))):
                self.fail(node, f"{name}: {argument} = {value!r}: expected {in_words(known.annotation)}")
        return self._made(node, maker, *bound.args, **bound.kwargs)

    def _made(self, node: ast.AST, maker: Callable[..., Any], *values: Any, **given: Any) -> Any:
        try:
            return maker(*values, **given)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(node, str(error))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
