"""What a task is made of: problems, verdicts and the verifier that turns a response into a verdict."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from opdkit.config import TaskConfig

T = TypeVar("T")
PROBE = 16  # problems that are looked at where all of them would take too long

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, as chat templates read it


@dataclass(frozen=True)
class Problem:
    """One prompt with what is needed to judge a response."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None  # what the verifier compares with; a dataset rollout's response where there is no other
    domain: str = "default"
    system: str | None = None
    response: str | tuple[Message, ...] | None = None  # target of dataset rollouts: one answer, or turns with tools
    tools: tuple[Message, ...] | None = None  # JSON schemas of the tools that the chat template shows
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement: a reward (usually in [0, 1]) and whether the answer counts as correct."""

    reward: float
    correct: bool
    feedback: str | None = None  # what it says about the response, such as the errors of a program


Verifier = Callable[[Problem, str], Verdict]


class Trace(str):
    """A response as text, parts of which a tool wrote: they are read and not trained on, and end a turn."""

    parts: tuple[tuple[str, bool], ...]  # (text, whether the model writes it)

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "Trace":
        new = super().__new__(cls, "".join(text for text, _ in parts))
        new.parts = tuple(parts)
        return new


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are read: a subclass gives `__len__` and `item`."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Item `index`, from 0 to the length."""

    def many(self, indices: Iterable[int]) -> list[T]:
        """Items at several of such indices, for sequences that make them faster together."""
        return [self.item(i) for i in indices]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self.many(range(*index.indices(len(self))))
        return self.item(range(len(self))[index])  # negative indices and IndexError as for a list


@dataclass(frozen=True)
class Task:
    """Training and held-out problems with one verifier; `train` and `eval` share no prompt.

    The dataset response of a problem is `Problem.response`, else what `target` writes (with scratchpad), else
    `Problem.answer`. `config` says through which template it is rendered.
    """

    name: str
    train: Sequence[Problem]
    eval: Sequence[Problem]
    verify: Verifier | None = None
    target: Callable[[Problem], str] | None = None
    config: TaskConfig = TaskConfig(kind="file")


def listed(task: Task, probe: int = PROBE) -> tuple[list[Problem], bool]:
    """The training problems and whether these are all: of generated ones the first `probe` and the held-out ones."""
    if isinstance(task.train, list | tuple):
        return list(task.train), True
    return [*task.train[:probe], *task.eval], False
