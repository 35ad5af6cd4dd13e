"""A method as a value: rollout sources, views, terms and hooks, checked when it is built.

A `Method` prints, compares (`==`), serialises (`to_dict`, `from_dict`) and holds no tensors. The engine knows methods
only through this type; `methods/` holds one file per published method.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from opdkit.config import nearest
from opdkit.errors import MethodError, RecipeError
from opdkit.losses import CrossEntropy, Divergence, Loss, PolicyGradient, Reduction, SupportPolicyGradient
from opdkit.pieces import Piece, make_piece
from opdkit.support import Full, Sampled, Support, TopK
from opdkit.weights import ones


@dataclass(frozen=True)
class OnPolicy:
    """The student samples its own responses to `share` of the step's prompts."""

    share: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """The task's own target responses stand as rollouts for `share` of the step's prompts."""

    share: float = 1.0


@dataclass(frozen=True)
class Linear:
    """A schedule: from `start` to `end` over the first `until` of the run, then constant."""

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.until <= 0:
            raise MethodError(f"Linear: until = {self.until} must be positive; it is a share of the run")

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


@runtime_checkable
class Hook(Protocol):
    """Runs after every update. Its state lives in `Step.state[name]` and in the checkpoint, never in the hook."""

    @property
    def name(self) -> str: ...

    def init(self) -> dict[str, Any]: ...

    def update(self, state: dict[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class View:
    """Who scores, having read what, on which tokens."""

    model: str  # "student" or a teacher's name in the recipe
    support: Support = Sampled()
    context: Literal["own"] = "own"  # own: the model reads the rollout's own prompt


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand: coef x mean over its own counted tokens of weight x loss(signal)."""

    loss: Loss = PolicyGradient()
    signal: Piece | None = None
    weight: Piece = field(default_factory=ones)
    coef: float | Linear = 1.0
    on: str = "policy"
    reduction: Reduction = "token_mean"

    def coefficient(self, progress: float) -> float:
        return self.coef(progress) if isinstance(self.coef, Linear) else self.coef


@dataclass(frozen=True, kw_only=True)
class Method:
    """rollout sources + prepare steps + views + terms + after-update hooks. Raises MethodError when they do not fit."""

    name: str
    rollouts: Mapping[str, OnPolicy | Dataset] = field(default_factory=lambda: {"policy": OnPolicy()})
    prepare: tuple[Callable[[list[Any]], list[Any]], ...] = ()  # list[Rollout] -> list[Rollout], before the views
    views: Mapping[str, View]
    terms: tuple[Term, ...]
    after_update: tuple[Hook, ...] = ()

    def __post_init__(self) -> None:
        if not self.terms:
            raise MethodError(f"method {self.name} has no terms; give at least one Term")
        if (
            abs(sum(s.share for s in self.rollouts.values()) - 1.0) > 1e-9
            or min(s.share for s in self.rollouts.values()) <= 0
        ):
            raise MethodError(f"method {self.name}: the shares of its rollout sources must be positive and add up to 1, got "
                              + ", ".join(f"{n} {s.share}" for n, s in self.rollouts.items()))  # fmt: skip
        for reserved in ("student", "behaviour"):
            if reserved in self.views:
                raise MethodError(
                    f"method {self.name}: view '{reserved}' is recorded while sampling; name this view differently"
                )
        for term in self.terms:
            self._check(term)
        for name in self.views:
            if not any(view == name for term in self.terms for _, view, _ in self._needs(term)):
                raise MethodError(f"method {self.name}: no term reads view '{name}'; remove it or use it")

    def _needs(self, term: Term) -> list[tuple[str, str, str]]:
        """(who reads, view, field) of a term's signal, weight and loss."""
        pieces = [p for p in (term.signal, term.weight) if p is not None]
        found = [(repr(who), need) for p in pieces for who, need in p.needs]
        found += [(repr(term.loss), need) for need in term.loss.needs()]
        return [(who, *need.split(".", 1)) for who, need in found]  # type: ignore[misc]

    def _check(self, term: Term) -> None:
        if term.on not in self.rollouts:
            raise MethodError(f"method {self.name}: a term trains on '{term.on}', but the rollout sources are "
                              f"{', '.join(self.rollouts)}")  # fmt: skip
        if (term.loss.signal_rank == 0) != (term.signal is None):
            verb = "takes no signal; drop it" if term.signal is not None else "needs a signal such as log_ratio()"
            raise MethodError(f"method {self.name}: {term.loss} {verb}")
        if isinstance(term.loss, Divergence) and term.loss.tail != "bucket":
            compared = self.views.get(term.loss.teacher)
            if compared is not None and isinstance(compared.support, Full):
                raise MethodError(f"method {self.name}: tail = {term.loss.tail!r} has no effect on view "
                                  f"'{term.loss.teacher}', which has support Full(); drop it")  # fmt: skip
        if isinstance(term.loss, PolicyGradient | SupportPolicyGradient) and not isinstance(
            self.rollouts[term.on], OnPolicy
        ):
            raise MethodError(f"method {self.name}: {term.loss} trains on '{term.on}', which the student did not sample; "
                              "a policy gradient is only right on its own samples")  # fmt: skip
        for who, view, what in self._needs(term):
            if view == "behaviour" and not isinstance(self.rollouts[term.on], OnPolicy):
                raise MethodError(f"method {self.name}: {who} reads the sampler's log-probs, but '{term.on}' was not "
                                  "sampled by the student; use an OnPolicy source")  # fmt: skip
            if view in ("rollouts", "student", "behaviour"):
                continue
            if view not in self.views:
                raise MethodError(f"method {self.name}: {who} reads view '{view}', but the views are "
                                  f"{', '.join(self.views) or 'none'}; add views={{'{view}': View(...)}}")  # fmt: skip
            given = self.views[view].support
            wanted = {"candidates": TopK, "full": Full, "distribution": TopK | Full}.get(what)
            if wanted is not None and not isinstance(given, wanted):
                hint = {"candidates": "TopK(k)", "full": "Full()"}.get(what, "TopK(k) or Full()")
                raise MethodError(f"method {self.name}: {who} reads the {what} of view '{view}', which has support "
                                  f"{given}; give that view support={hint}")  # fmt: skip

    def reads_student(self, source: str) -> bool:
        """Whether a term on this source needs the student's own log-probs before the update."""
        terms = [term for term in self.terms if term.on == source]
        supports = [
            self.views[view].support for term in terms for _, view, _ in self._needs(term) if view in self.views
        ]
        read = any(view == "student" for term in terms for _, view, _ in self._needs(term))
        return read or any(isinstance(support, TopK) for support in supports)

    @property
    def needs_reward(self) -> bool:
        return any(what in ("reward", "correct") for term in self.terms for _, _, what in self._needs(term))

    @property
    def needs_group(self) -> bool:
        return any(what == "group" for term in self.terms for _, _, what in self._needs(term))

    def __str__(self) -> str:
        """The composition, one part a line."""
        lines = [f"{self.name}:"]
        lines += [f"  rollouts  {name} = {source}" for name, source in self.rollouts.items()]
        lines += [f"  prepare   {step}" for step in self.prepare]
        lines += [f"  view      {name} = {view}" for name, view in self.views.items()]
        for term in self.terms:
            signal = "" if term.signal is None else f" of {term.signal}"
            weight = "" if term.weight == ones() else f", weight {term.weight}"
            lines.append(f"  term      {term.coef} x {term.reduction} on {term.on}: {term.loss}{signal}{weight}")
        return "\n".join(lines + [f"  after     {hook}" for hook in self.after_update])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description. Raises MethodError for parts that are not among the engine's own types."""
        return encode(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Method":
        method = decode(data)
        assert isinstance(method, Method)
        return method


_TYPES = {t.__name__: t for t in (Method, Term, View, OnPolicy, Dataset, Linear, Sampled, TopK, Full, PolicyGradient,
                                  SupportPolicyGradient, CrossEntropy, Divergence)}  # fmt: skip


def encode(value: Any) -> Any:
    """A method or any part of it as JSON types."""
    if isinstance(value, Piece):
        return {"piece": value.name, "args": {k: encode(v) for k, v in value.args}}
    if type(value).__name__ in _TYPES:
        return {
            "type": type(value).__name__,
            **{f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, Mapping):
        return {"map": {k: encode(v) for k, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise MethodError(f"cannot serialise {value!r}: it is not one of the engine's pieces, losses, supports or sources")


def decode(data: Any) -> Any:
    """The value that `encode` described; only the engine's own types are made. Raises MethodError."""
    if not isinstance(data, dict):
        return data
    if "piece" in data:
        return make_piece(data["piece"], {k: decode(v) for k, v in data["args"].items()})
    if "tuple" in data:
        return tuple(decode(v) for v in data["tuple"])
    if "map" in data:
        return {k: decode(v) for k, v in data["map"].items()}
    if data.get("type") not in _TYPES:
        raise MethodError(
            f"unknown type {data.get('type')!r} in a serialised method; known: {', '.join(sorted(_TYPES))}"
        )
    return _TYPES[data["type"]](**{k: decode(v) for k, v in data.items() if k != "type"})


# ---------------------------------------------------------------------------------------------------------------------
# The published methods


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
    try:
        TypeAdapter(argument.annotation, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"method {name}: {argument.name}={value!r}: expected {inspect.formatannotation(argument.annotation)}"
        ) from error


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
