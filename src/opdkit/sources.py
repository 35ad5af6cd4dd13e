"""Rollout sources as values: where the responses of a step come from. `rollouts.sources` makes the rollouts.

Every source has `share`, its part of the step's prompts; the shares of a method add up to 1.
"""

from dataclasses import dataclass
from typing import Literal

from opdkit.contexts import Context
from opdkit.errors import MethodError
from opdkit.pieces import Piece, flat
from opdkit.serialise import register
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class EarlyStop(Value):
    """Sampling ends a response in which an event has happened `events` times, looked at after every `every`-th token.

    `event` is a piece [N], 1 at an event and 0 elsewhere, that reads one view besides the student, token by token
    (`opdkit.drift`). The view's model reads along while the student writes (`rollouts.early`), and its states are kept for
    scoring, so it reads no token twice.
    """

    event: Piece
    events: int
    every: int = 64

    def __post_init__(self) -> None:
        flat(self.event, "EarlyStop")
        if self.events < 1 or self.every < 1:
            raise MethodError(
                f"EarlyStop(events={self.events}, every={self.every}): expected at least 1 event and 1 token"
            )
        read = {need.split(".")[0] for need in self.needs()} - {"student"}
        if len(read) != 1:
            raise MethodError(f"{self}: its event reads {', '.join(sorted(read)) or 'no view'}; it must read one view besides "
                              "the student")  # fmt: skip
        for what in (need.split(".", 1)[1] for need in self.needs()):
            if what != "sampled" and not what.startswith("top:"):
                raise MethodError(f"{self}: its event reads the {what} of a view, which is not known while sampling; take an "
                                  "event on sampled tokens and top lists")  # fmt: skip

    def needs(self) -> tuple[str, ...]:
        return tuple(need for _, need in self.event.needs)

    @property
    def view(self) -> str:
        """The view that the event reads."""
        return next(view for view in (need.split(".")[0] for need in self.needs()) if view != "student")


@dataclass(frozen=True, repr=False)
class OnPolicy(Value):
    """The student samples its own responses.

    With `mixed_with`, a teacher's name, every token is drawn from mix x teacher + (1 - mix) x student (MiniLLM's
    teacher-mixed sampling, 2306.08543 Eq. 6). View "behaviour" then holds the log-probs of that mixture, and a policy
    gradient needs a weight that reads them.
    """

    share: float = 1.0
    mixed_with: str | None = None
    mix: float = 0.0  # the teacher's share of the mixture, in [0, 1)
    stop_early: EarlyStop | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix < 1.0 or (self.mix > 0) != (self.mixed_with is not None):
            raise ValueError(
                f"OnPolicy(mixed_with={self.mixed_with!r}, mix={self.mix}): give a teacher's name and its share "
                "strictly between 0 and 1, or neither"
            )


@dataclass(frozen=True, repr=False)
class Dataset(Value):
    """The task's own target responses stand as rollouts.

    With a `context` the student reads before them what that context shows, in place of its own prompt, and learns to read
    it: what a self-teacher must be able to do.
    """

    share: float = 1.0
    context: Literal["own"] | Context = "own"

    def __post_init__(self) -> None:
        _check_context(self, self.context)


@dataclass(frozen=True, repr=False)
class TeacherSamples(Value):
    """A teacher's responses, sampled once per prompt and kept on disk; temperature 0 is greedy.

    The teacher reads the plain prompt. The student reads what the `context` shows, as in `Dataset`; the responses are
    verified where it says whether they are right.
    """

    share: float = 1.0
    teacher: str = "teacher"
    temperature: float = 1.0
    context: Literal["own"] | Context = "own"

    def __post_init__(self) -> None:
        _check_context(self, self.context)


@dataclass(frozen=True, repr=False)
class Replay(Value):
    """Responses that the student sampled in earlier steps, newest `capacity` of them kept, drawn without replacement.

    A step for which the buffer holds too few takes fresh student samples in their place. Its state is saved.
    """

    share: float = 1.0
    capacity: int = 1024  # rollouts

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"Replay(capacity={self.capacity}): expected at least 1 rollout")


Source = OnPolicy | Dataset | TeacherSamples | Replay


def _check_context(source: Dataset | TeacherSamples, context: Literal["own"] | Context) -> None:
    if context != "own" and "rollouts.group" in context.needs():
        raise MethodError(f"{source}: its context shows a sibling, but these sources have one response to a prompt; show a "
                          "Solution() or Feedback()")  # fmt: skip


def context_of(source: Source) -> Literal["own"] | Context:
    """What the student reads before the responses of a source; those that it samples stand after its own prompt."""
    return source.context if isinstance(source, Dataset | TeacherSamples) else "own"


register(EarlyStop, OnPolicy, Dataset, TeacherSamples, Replay)
