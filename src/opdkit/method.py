"""A method as a value: rollout sources, views, terms, controllers and hooks, checked when it is built.

A `Method` prints, compares (`==`), serialises (`to_dict`, `from_dict`) and holds no tensors. The engine knows methods
only through this type; `methods/` holds one file per published method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkit.contexts import Context
from opdkit.controllers import Controller
from opdkit.errors import MethodError
from opdkit.hooks import Hook
from opdkit.losses import Divergence, PolicyGradient
from opdkit.metrics import LOGGED
from opdkit.pieces import Piece, flat
from opdkit.prepare import Prepare
from opdkit.reduction import Reduction
from opdkit.rows import Loss
from opdkit.serialise import decode, encode, register
from opdkit.sources import EarlyStop, OnPolicy, Source, TeacherSamples, context_of
from opdkit.support import Full, TopK
from opdkit.view import View
from opdkit.weights import ones


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
    """rollout sources + prepare steps + views + terms + controllers + after-update hooks. MethodError when they do not fit.

    Prepare steps run on the source "policy", after the verifier. `watch` names further numbers for the log: the mean of
    each piece over the tokens of "policy".
    """

    name: str
    rollouts: Mapping[str, Source] = field(default_factory=lambda: {"policy": OnPolicy()})
    prepare: tuple[Prepare, ...] = ()
    views: Mapping[str, View]
    terms: tuple[Term, ...]
    controllers: tuple[Controller, ...] = ()
    after_update: tuple[Hook, ...] = ()
    watch: Mapping[str, Piece] = field(default_factory=dict)

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
        self._check_controllers()
        for early in self._early():
            self._check_early(early)
        if (self.watch or self.prepare) and "policy" not in self.rollouts:
            raise MethodError(f"method {self.name}: prepare steps and watched pieces read the source 'policy', but the "
                              f"rollout sources are {', '.join(self.rollouts)}")  # fmt: skip
        for label, piece in self.watch.items():
            if label.split("/")[0] in LOGGED:
                raise MethodError(f"method {self.name}: watch '{label}' has the name of a number that is logged anyway; give "
                                  "it another name")  # fmt: skip
            flat(piece, "watch")
            self._check_needs(_read_by(piece), "policy")
        for name in self.views:
            if not any(view == name for _, view, _ in self._all_needs()):
                raise MethodError(f"method {self.name}: no term reads view '{name}'; remove it or use it")

    def _needs(self, term: Term) -> list[tuple[str, str, str]]:
        """(who reads, view, field) of a term's signal, weight and loss."""
        found = [need for piece in (term.signal, term.weight) if piece is not None for need in _read_by(piece)]
        return found + _split(term.loss, term.loss.needs())

    def _check(self, term: Term) -> None:
        if term.on not in self.rollouts:
            raise MethodError(f"method {self.name}: a term trains on '{term.on}', but the rollout sources are "
                              f"{', '.join(self.rollouts)}")  # fmt: skip
        if (term.loss.signal_rank == 0) != (term.signal is None):
            verb = "takes no signal; drop it" if term.signal is not None else "needs a signal such as log_ratio()"
            raise MethodError(f"method {self.name}: {term.loss} {verb}")
        for what, part, rank in (("signal", term.signal, term.loss.signal_rank), ("weight", term.weight, 1)):
            if part is not None and part.rank not in (None, rank):
                shapes = {1: "[N], one number per token", 2: "[N, K], one number per candidate"}
                raise MethodError(f"method {self.name}: {what} {part} is {shapes[part.rank or 1]}, but "
                                  f"{term.loss if what == 'signal' else 'a weight'} needs {shapes[rank]}")  # fmt: skip
        if isinstance(term.loss, Divergence) and term.loss.tail != "bucket":
            compared = self.views.get(term.loss.teacher)
            if compared is not None and isinstance(compared.support, Full):
                raise MethodError(f"method {self.name}: tail = {term.loss.tail!r} has no effect on view "
                                  f"'{term.loss.teacher}', which has support Full(); drop it")  # fmt: skip
        if term.loss.own_samples and not isinstance(self.rollouts[term.on], OnPolicy):
            raise MethodError(f"method {self.name}: {term.loss} trains on '{term.on}', which the student did not sample; "
                              "its expected gradient is only right on the student's own samples")  # fmt: skip
        if term.loss.own_samples and self._mixed(term.on):
            read = [view for piece in (term.signal, term.weight) if piece for _, need in piece.needs
                    for view in [need.split(".")[0]]]  # fmt: skip
            if "behaviour" not in read:
                raise MethodError(f"method {self.name}: '{term.on}' is sampled from a mixture with a teacher, and {term.loss} "
                                  "is only right with an importance weight, such as weight=importance()")  # fmt: skip
        self._check_needs(self._needs(term), term.on)

    def _check_controllers(self) -> None:
        names = [c.name for c in self.controllers] + [h.name for h in self.after_update]
        if twice := [name for name in names if names.count(name) > 1]:
            raise MethodError(f"method {self.name}: two controllers or hooks are named '{twice[0]}'; their state is kept by "
                              "name, so give them different ones")  # fmt: skip
        for c in self.controllers:
            if c.on not in self.rollouts:
                raise MethodError(f"method {self.name}: {c} reads '{c.on}', but the rollout sources are "
                                  f"{', '.join(self.rollouts)}")  # fmt: skip
            self._check_needs(_split(c, c.needs()), c.on)

    def _early(self) -> list[EarlyStop]:
        return [s.stop_early for s in self.rollouts.values() if isinstance(s, OnPolicy) and s.stop_early is not None]

    def _check_early(self, early: EarlyStop) -> None:
        if early.view not in self.views:
            raise MethodError(f"method {self.name}: {early} reads view '{early.view}', but the views are "
                              f"{', '.join(self.views) or 'none'}")  # fmt: skip
        view = self.views[early.view]
        if not isinstance(view.model, str) or view.context != "own":
            raise MethodError(f"method {self.name}: {early} needs a view of one model that reads the rollouts' own prompts, "
                              f"but view '{early.view}' is {view}; leave out the early stop")  # fmt: skip

    @property
    def top_list(self) -> int:
        """The most ids of a view's own top list that any part reads; 0 = none."""
        found = [what for _, _, what in self._all_needs()]
        return max([int(what.removeprefix("top:")) for what in found if what.startswith("top:")], default=0)

    def _all_needs(self) -> list[tuple[str, str, str]]:
        """(who reads, view, field) of all terms, controllers, prepare steps and watched pieces."""
        found = [need for term in self.terms for need in self._needs(term)]
        found += [need for piece in self.watch.values() for need in _read_by(piece)]
        shown = [view.context for view in self.views.values()] + [context_of(s) for s in self.rollouts.values()]
        contexts = [context for context in shown if context != "own"]
        parts: list[Controller | Prepare | Hook | Context | EarlyStop]
        parts = [*self.controllers, *self.prepare, *self.after_update, *contexts, *self._early()]
        return found + [need for part in parts for need in _split(part, part.needs())]

    def _check_needs(self, needs: list[tuple[str, str, str]], source: str) -> None:
        for who, view, what in needs:
            if view == "behaviour" and not isinstance(self.rollouts[source], OnPolicy):
                raise MethodError(f"method {self.name}: {who} reads the sampler's log-probs, but '{source}' was not "
                                  "sampled by the student; use an OnPolicy source")  # fmt: skip
            if view == "state" and what not in [c.name for c in self.controllers]:
                raise MethodError(f"method {self.name}: {who} reads the state of '{what}', but the controllers are "
                                  f"{', '.join(c.name for c in self.controllers) or 'none'}; add it")  # fmt: skip
            if view in ("rollouts", "student", "behaviour", "state"):
                continue
            if view not in self.views:
                raise MethodError(f"method {self.name}: {who} reads view '{view}', but the views are "
                                  f"{', '.join(self.views) or 'none'}; add views={{'{view}': View(...)}}")  # fmt: skip
            if what == "informed" and self.views[view].context == "own":
                raise MethodError(f"method {self.name}: {who} masks by the context of view '{view}', which reads the "
                                  "rollout's own prompt; give that view a context, such as Shown()")  # fmt: skip
            given = self.views[view].support
            wanted = {"candidates": TopK, "full": Full, "distribution": TopK | Full}.get(what)
            if wanted is not None and not isinstance(given, wanted):
                hint = {"candidates": "TopK(k)", "full": "Full()"}.get(what, "TopK(k) or Full()")
                raise MethodError(f"method {self.name}: {who} reads the {what} of view '{view}', which has support "
                                  f"{given}; give that view support={hint}")  # fmt: skip

    def initial_state(self) -> dict[str, dict[str, Any]]:
        """What the controllers remember before the first step, by their names."""
        return {c.name: c.init() for c in self.controllers}

    def reads(self, term: Term) -> set[str]:
        """The views that a term's signal, weight and loss read."""
        return {view for _, view, _ in self._needs(term)}

    def _mixed(self, source: str) -> bool:
        given = self.rollouts[source]
        return isinstance(given, OnPolicy) and given.mixed_with is not None

    def reads_student(self, source: str) -> bool:
        """Whether a term on this source needs the student's own log-probs before the update."""
        terms = [term for term in self.terms if term.on == source]
        supports = [
            self.views[view].support for term in terms for _, view, _ in self._needs(term) if view in self.views
        ]
        read = any(view == "student" for term in terms for _, view, _ in self._needs(term))
        return read or any(isinstance(support, TopK) for support in supports)

    @property
    def asks(self) -> list[tuple[str, str]]:
        """(who asks, a teacher's name) for every view and rollout source that names one."""
        found = [(f"view '{name}'", model) for name, view in self.views.items() for model in view.models]
        for name, source in self.rollouts.items():
            if isinstance(source, OnPolicy) and source.mixed_with is not None:
                found.append((f"source '{name}'", source.mixed_with))
            elif isinstance(source, TeacherSamples):
                found.append((f"source '{name}'", source.teacher))
        return found

    @property
    def models(self) -> tuple[str, ...]:
        """The teachers that views and rollout sources name, each once."""
        return tuple(dict.fromkeys(teacher for _, teacher in self.asks))

    @property
    def needs_reward(self) -> bool:
        return any(what in ("reward", "correct") for _, _, what in self._all_needs())

    @property
    def needs_group(self) -> bool:
        return any(what == "group" for _, _, what in self._all_needs())

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
        lines += [f"  control   {controller}" for controller in self.controllers]
        lines += [f"  watch     {name} = {piece}" for name, piece in self.watch.items()]
        return "\n".join(lines + [f"  after     {hook}" for hook in self.after_update])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description. Raises MethodError for parts that are not among the engine's own types."""
        return encode(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Method":
        method = decode(data)
        assert isinstance(method, Method)
        return method


def _read_by(piece: Piece) -> list[tuple[str, str, str]]:
    return [need for who, what in piece.needs for need in _split(who, (what,))]


def _split(
    part: Piece | Loss | Controller | Prepare | Hook | Context | EarlyStop, needs: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """(who reads, view, field) of some needs."""
    return [(repr(part), *need.split(".", 1)) for need in needs]  # type: ignore[misc]


register(Method, Term, Linear)
