"""Hooks: what happens to the student's weights after an update, such as a jump along the way that they went.

A hook is a value. Its state is a dict in `Step.state[name]`, made by `init` and `update` and saved by every checkpoint.
The training loop calls it (`opdkit.train.hooks`); controllers (`opdkit.controllers`) read batches and touch no weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class Now:
    """What a hook may read and change after a step's updates; at step 0 before the first one."""

    step: int
    metrics: Mapping[str, float]  # of the step's updates: loss, grad_norm, lr
    parameters: Mapping[str, Tensor]  # those that are trained, by name, to be changed in place; all of the student's
    problems: int  # training problems that `accuracy` may use
    accuracy: Callable[
        [int], float
    ]  # of the student on so many training problems; NaN where its numbers are not finite


@dataclass(frozen=True)
class Work:
    """What a hook costs, for a plan, at most: how often it acts in a run, and each time how often it asks for an accuracy
    on how many problems; and bytes of main memory, always, beside them while it asks, and at its end."""

    times: int = 0
    accuracies: int = 0
    problems: int = 0
    kept: int = 0
    asking: int = 0
    ending: int = 0


@runtime_checkable
class Hook(Protocol):
    """Runs after every step's updates, in every process alike.

    A hook may also say what it costs, `work(steps, parameters) -> Work`; a plan counts nothing for one that does not.
    """

    @property
    def name(self) -> str: ...

    def needs(self) -> tuple[str, ...]:
        """What it reads, as "rollouts.correct" where it asks for an accuracy, which needs a verifier."""
        ...

    def init(self, now: Now) -> State: ...

    def update(self, state: State, now: Now) -> tuple[State, dict[str, float]]:
        """(the new state, numbers that are logged with this step as NAME/...)."""
        ...
