"""AntiSD's gate: a controller that switches a signal off when the teacher's entropy collapses (arXiv:2605.11609 Eq. 7).

Left out: other statistics than the median, and gates that close by degrees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from opdkit.controllers import State
from opdkit.errors import MethodError
from opdkit.serialise import register
from opdkit.step import Step
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class EntropyGate(Value):
    """Open or closed by the median entropy H (nats) of a view over the step's tokens, with hysteresis.

    For the first `warmup` steps it is closed, and the median of their H becomes the level. Then it is open; an open gate
    closes when H < close x level, a closed one opens when H >= level. A level below `inert` nats says nothing: the gate then
    stays open. It decides before the step's signals are formed. Medians are means of the middle two values where the number
    is even. Defaults: the paper's; `inert` and the pooling of the warm-up are those of a third-party reproduction, as the
    paper does not state them.
    """

    name: str = "gate"
    view: str = "teacher"
    warmup: int = 5
    close: float = 0.93
    inert: float = 1e-3
    on: str = "policy"
    when: Literal["before"] = "before"

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise MethodError(f"EntropyGate(warmup={self.warmup}): expected at least 1 step to learn its level from")
        if not 0 < self.close < 1:
            raise MethodError(
                f"EntropyGate(close={self.close}): expected a share of the level, strictly between 0 and 1"
            )

    def needs(self) -> tuple[str, ...]:
        return (f"{self.view}.sampled",)

    def check(self, window: int) -> None:
        """It limits no length: any window will do."""

    def shortest(self, window: int) -> int:
        return window

    def init(self) -> State:
        return {"warmup": [], "closed": False, "open": False, "entropy": 0.0}

    def measure(self, step: Step) -> Float[Tensor, " n"]:
        """The view's entropy at every token, in nats."""
        entropy = step.views[self.view].entropy
        assert entropy is not None
        return entropy

    def update(self, state: State, values: Float[Tensor, " n"]) -> State:
        """One step of the state machine. `open` is what signals read; `closed` is the hysteresis after the warm-up."""
        values = values[values.isfinite()]
        if not values.numel():  # a step in which the view gave no number says nothing
            return dict(state)
        entropy = _median(values)
        if len(state["warmup"]) < self.warmup:
            return {**state, "warmup": [*state["warmup"], entropy], "open": False, "entropy": entropy}
        level = median(state["warmup"])
        closed = entropy < level if state["closed"] else entropy < self.close * level
        closed = closed and level >= self.inert
        return {**state, "closed": closed, "open": not closed, "entropy": entropy}

    def response_limit(self, state: Mapping[str, Any]) -> int | None:
        return None

    def metrics(self, state: Mapping[str, Any]) -> dict[str, float]:
        """The state of the gate, the step's median entropy, and the level once it is known (nats)."""
        found = {"open": float(state["open"]), "entropy": state["entropy"]}
        return found | ({"level": median(state["warmup"])} if len(state["warmup"]) == self.warmup else {})


def _median(values: Float[Tensor, " n"]) -> float:
    """The middle value, or the mean of the middle two (torch.median gives the lower one)."""
    ordered = values.double().sort().values
    n = ordered.numel()
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2


register(EntropyGate)
