"""Controllers: small state machines of a run, such as a gate or a limit, that follow what the batches say.

A controller is a value. Its state is a dict in `Step.state[name]`, made by `init` and `update` and saved by every
checkpoint, so a resumed run goes on exactly. Several processes agree, because `update` sees the numbers of all of them.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from opdkit.step import Step

State = dict[str, Any]


@runtime_checkable
class Controller(Protocol):
    """Reads some numbers of every batch and moves its state.

    `on` is the rollout source that it reads. `when` says whom the new state reaches first: "before": the signals and
    weights of this same step; "after": the next step.
    """

    @property
    def name(self) -> str: ...

    @property
    def on(self) -> str: ...

    @property
    def when(self) -> Literal["before", "after"]: ...

    def needs(self) -> tuple[str, ...]:
        """What `measure` reads, as "VIEW.FIELD" (opdkit.pieces)."""
        ...

    def check(self, window: int) -> None:
        """Raise RecipeError where it has no effect on runs whose sampling.max_new_tokens is `window`."""
        ...

    def shortest(self, window: int) -> int:
        """The least response limit that it may set in such a run, in tokens; `window` where it sets none."""
        ...

    def init(self) -> State: ...

    def measure(self, step: Step) -> Float[Tensor, " n"]:
        """This process's numbers of a batch, any count; `update` gets those of all processes in one tensor."""
        ...

    def update(self, state: State, values: Float[Tensor, " n"]) -> State: ...

    def response_limit(self, state: Mapping[str, Any]) -> int | None:
        """Most response tokens of the next rollouts; None = it does not say."""
        ...

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """What is logged of the state at every step."""
        ...
