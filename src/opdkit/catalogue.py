"""The published methods by name: listed, made from a recipe's arguments, explained.

Each is a module of `opdkit.methods` with one function of the same name that returns a `Method`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from math import isnan
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from opdkit.config import nearest
from opdkit.errors import MethodError, RecipeError
from opdkit.method import Method


def method_names() -> list[str]:
    """The names in `opdkit.methods`, sorted."""
    import opdkit.methods

    return sorted(m.name for m in pkgutil.iter_modules(opdkit.methods.__path__))


def method_function(name: str) -> Callable[..., Method]:
    """The function that makes a published method. Raises RecipeError naming the nearest one."""
    if name not in method_names():
        raise RecipeError(f"unknown method '{name}'{nearest(name, method_names())}")
    return getattr(importlib.import_module(f"opdkit.methods.{name}"), name)


def build_method(name: str, arguments: Mapping[str, Any]) -> Method:
    """Make a method from a recipe's name and arguments. Raises RecipeError or MethodError."""
    function = method_function(name)
    known = inspect.signature(function).parameters
    for given, value in arguments.items():
        if given not in known:
            raise RecipeError(f"method {name} has no argument '{given}'{nearest(given, list(known))}")
        _check_argument(name, known[given], value)
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, MethodError):
            raise
        raise RecipeError(f"method {name}: {error}") from error


def _check_argument(name: str, argument: inspect.Parameter, value: Any) -> None:
    """Raise RecipeError unless `value` fits the argument's annotation (numbers are not made from strings)."""
    if isinstance(value, float) and isnan(value):
        raise RecipeError(f"method {name}: {argument.name}={value!r}: expected a number")
    try:
        TypeAdapter(argument.annotation, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"method {name}: {argument.name}={value!r}: expected {in_words(argument.annotation)}"
        ) from error


def in_words(annotation: Any) -> str:
    """What an annotation allows, as a person writes it in a recipe: `'signal' or 'terms'`, `float or null`."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(in_words(one) for one in inner)
    return "null" if annotation is NoneType else inspect.formatannotation(annotation)


def method_table() -> list[tuple[str, str, str]]:
    """(name, one line, paper) of every published method."""
    return [(name, *_headline(name)) for name in method_names()]


def _headline(name: str) -> tuple[str, str]:
    doc = inspect.getdoc(importlib.import_module(f"opdkit.methods.{name}")) or ""
    line = doc.splitlines()[0].rstrip(".")
    text, _, paper = line.rpartition(" (arXiv:")
    return (text or line, f"arXiv:{paper.rstrip(')')}" if text else "")


def explain(name: str) -> str:
    """Docstring, arguments with defaults, and composition of a method. Raises RecipeError for an unknown name."""
    function = method_function(name)
    doc = inspect.getdoc(importlib.import_module(f"opdkit.methods.{name}"))
    arguments = [f"  {p.name}: {inspect.formatannotation(p.annotation)} = {p.default!r}"
                 for p in inspect.signature(function).parameters.values()]  # fmt: skip
    return f"{doc}\n\nArguments:\n" + "\n".join(arguments) + f"\n\nComposition with the defaults:\n{function()}"
