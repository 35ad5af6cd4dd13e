"""Signals and weights as values: a pure function of a Step with its arguments, that prints, compares and serialises.

`@piece(needs...)` turns `def f(step, *, a=1)` into a maker: `f(a=2)` is a `Piece` which is called with a step. A need is
a string "VIEW.FIELD" whose braces name arguments of the function, so that a method can be checked when it is built:

    sampled        the view scores the sampled token (every view does)
    distribution   the view has support TopK or Full
    candidates     the view has support TopK
    full           the view has support Full
    top:K          the view records its own K most probable ids (every view does; any K)
    rollouts.reward, rollouts.correct   a verifier judges the rollouts
    rollouts.group                      at least two responses per prompt

Its return annotation declares its rank: Float[Tensor, " N"] is 1 and Float[Tensor, "N K"] is 2; a plain Tensor has the
rank of the pieces inside it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from opdkit.config import nearest
from opdkit.errors import MethodError
from opdkit.step import Step


@dataclass(frozen=True)
class _Function:
    call: Callable[..., Any]
    make: Callable[..., "Piece"]
    needs: tuple[str, ...]
    rank: int | None


_FUNCTIONS: dict[str, _Function] = {}  # what a serialised piece may name


@dataclass(frozen=True)
class Piece:
    """A named pure function Step -> [N] or [N, K] together with its arguments."""

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __call__(self, step: Step) -> Tensor:
        return _FUNCTIONS[self.name].call(step, **dict(self.args))

    def __repr__(self) -> str:
        shown: list[str] = []
        for name, value in self.args:
            if self.name.startswith("_"):  # plus, times and scale take theirs in order, without names
                shown += map(repr, value) if isinstance(value, tuple) else [repr(value)]
            else:
                shown.append(f"{name}={value!r}")
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

    @property
    def rank(self) -> int | None:
        """1 for [N], 2 for [N, K]; None where neither the function nor the pieces inside it declare it."""
        inside = [child.rank for child in self.children]
        return _FUNCTIONS[self.name].rank or max((r for r in inside if r is not None), default=None)


def piece(
    *needs: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Piece]]:
    """Decorate `def f(step, *, ...)`: the name now makes a Piece.

    Arguments are checked when the piece is made: their names, the values of a Literal, and by `check`, which takes all
    of them by name and raises MethodError.
    """

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Piece]:
        name = function.__name__
        signature = inspect.signature(function)
        choices = {p.name: get_args(p.annotation) for p in signature.parameters.values()
                   if get_origin(p.annotation) is Literal}  # fmt: skip

        def make(**arguments: Any) -> Piece:
            known = list(signature.parameters)[1:]
            for given in arguments:
                if given not in known:
                    raise TypeError(f"{name} has no argument '{given}'{nearest(given, known)}")
            bound = signature.bind(None, **arguments)
            bound.apply_defaults()
            made = Piece(name, tuple(bound.arguments.items())[1:])
            for argument, allowed in choices.items():
                if bound.arguments[argument] not in allowed:
                    raise MethodError(f"{made}: {argument} must be one of {', '.join(map(str, allowed))}")
            if check is not None:
                check(**dict(made.args))
            return made

        make.__name__, make.__doc__ = name, function.__doc__
        arguments = list(signature.parameters.values())[1:]
        make.__signature__ = inspect.Signature(arguments, return_annotation=Piece)  # type: ignore[attr-defined]
        rank = (
            len(getattr(signature.return_annotation, "dims", ())) or None
        )  # jaxtyping's shape; a plain Tensor has none
        _FUNCTIONS[name] = _Function(function, make, needs, rank)
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


def makers() -> dict[str, Callable[..., Piece]]:
    """What makes a piece, by its name, of all modules that are imported; `plus`, `minus`, `times` and `scale` too."""
    named = {name: function.make for name, function in _FUNCTIONS.items() if not name.startswith("_")}
    return named | {"plus": plus, "minus": minus, "times": times, "scale": scale}


def flat(of: Piece, name: str) -> None:
    """Raise MethodError when a piece that must be [N] is [N, K]."""
    if of.rank == 2:
        raise MethodError(f"{name} reads one number per token, but {of} is [N, K]: it has one per candidate")


def _check_sum(parts: tuple[Piece, ...]) -> None:
    if len({part.rank for part in parts} - {None}) > 1:
        ranks = ", ".join(f"{part} is {'[N, K]' if part.rank == 2 else '[N]'}" for part in parts)
        raise MethodError(f"cannot add signals of different shapes: {ranks}; give all of them one support")


@piece(check=_check_sum)
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
