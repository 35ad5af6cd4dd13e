"""Signals and weights as values: a pure function of a Step with its arguments, that prints, compares and serialises.

`@piece(needs...)` turns `def f(step, *, a=1)` into a maker: `f(a=2)` is a `Piece` which is called with a step. A need is
a string "VIEW.FIELD" whose braces name arguments of the function, so that a method can be checked when it is built:

    sampled        the view scores the sampled token (every view does)
    distribution   the view has support TopK or Full
    candidates     the view has support TopK
    full           the view has support Full
    rollouts.reward, rollouts.correct   a verifier judges the rollouts
    rollouts.group                      at least two responses per prompt
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdkit.config import nearest
from opdkit.errors import MethodError
from opdkit.step import Step


@dataclass(frozen=True)
class _Function:
    call: Callable[..., Any]
    make: Callable[..., "Piece"]
    needs: tuple[str, ...]


_FUNCTIONS: dict[str, _Function] = {}  # what a serialised piece may name


@dataclass(frozen=True)
class Piece:
    """A named pure function Step -> [N] or [N, K] together with its arguments."""

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __call__(self, step: Step) -> Tensor:
        return _FUNCTIONS[self.name].call(step, **dict(self.args))

    def __repr__(self) -> str:
        shown = [repr(value) if name == "parts" else f"{name}={value!r}" for name, value in self.args]
        return f"{self.name.lstrip('_')}({', '.join(shown)})"

    @property
    def children(self) -> tuple["Piece", ...]:
        found = []
        for _, value in self.args:
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Piece)]
        return tuple(found)

    @property
    def needs(self) -> tuple[tuple["Piece", str], ...]:
        """(the piece that reads, "VIEW.FIELD") of this piece and all inside it."""
        own = tuple((self, need.format(**dict(self.args))) for need in _FUNCTIONS[self.name].needs)
        return own + tuple(need for child in self.children for need in child.needs)


def piece(*needs: str) -> Callable[[Callable[..., Tensor]], Callable[..., Piece]]:
    """Decorate `def f(step, *, ...)`: the name now makes a Piece. Arguments are checked when the piece is made."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Piece]:
        name = function.__name__
        signature = inspect.signature(function)

        def make(**arguments: Any) -> Piece:
            known = list(signature.parameters)[1:]
            for given in arguments:
                if given not in known:
                    raise TypeError(f"{name} has no argument '{given}'{nearest(given, known)}")
            bound = signature.bind(None, **arguments)
            bound.apply_defaults()
            return Piece(name, tuple(bound.arguments.items())[1:])

        make.__name__, make.__doc__ = name, function.__doc__
        _FUNCTIONS[name] = _Function(function, make, needs)
        return make

    return wrap


def make_piece(name: str, arguments: dict[str, Any]) -> Piece:
    """A piece by name, as a serialised method gives it. Raises MethodError for an unknown name or argument."""
    if name not in _FUNCTIONS:
        raise MethodError(f"unknown piece '{name}'{nearest(name, list(_FUNCTIONS))}")
    try:
        return _FUNCTIONS[name].make(**arguments)
    except TypeError as error:
        raise MethodError(f"piece {name}: {error}") from error


@piece()
def _plus(step: Step, *, parts: tuple[Piece, ...]) -> Tensor:
    first, *rest = (part(step) for part in parts)
    for other in rest:
        first = first + _same_shape(first, other, parts)
    return first


@piece()
def _times(step: Step, *, parts: tuple[Piece, ...]) -> Tensor:
    first, *rest = (part(step) for part in parts)
    for other in rest:
        if first.ndim == 1 and other.ndim == 2:
            first, other = other, first
        first = first * (other[:, None] if first.ndim == 2 and other.ndim == 1 else _same_shape(first, other, parts))
    return first


@piece()
def _scale(step: Step, *, factor: float, parts: Piece) -> Tensor:
    return factor * parts(step)


def plus(*parts: Piece) -> Piece:
    """Sum of signals inside one term; under a clip this differs from a sum of terms."""
    return _plus(parts=parts)


def minus(signal: Piece, baseline: Piece) -> Piece:
    """signal - baseline."""
    return plus(signal, scale(-1.0, baseline))


def times(*parts: Piece) -> Piece:
    """Product of signals or weights; an [N] factor applies to every candidate of an [N, K] signal."""
    return _times(parts=parts)


def scale(factor: float, part: Piece) -> Piece:
    """factor x signal."""
    return _scale(factor=factor, parts=part)


def pipe(first: Piece, *then: Callable[..., Piece]) -> Piece:
    """Feed a piece through transforms, each a maker with one argument `of`: pipe(x, f, g) is g(of=f(of=x))."""
    for transform in then:
        first = transform(of=first)
    return first


def _same_shape(a: Tensor, b: Tensor, parts: tuple[Piece, ...]) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"cannot combine {parts}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    return b
