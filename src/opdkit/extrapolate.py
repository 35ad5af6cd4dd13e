"""EffOPD: a hook that jumps ahead along the way that the weights went, as long as an accuracy says that it helps.

Left out: what the paper's analysis part measures of updates (ranks, subspaces, scaled norms); it changes no training.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from opdkit.errors import MethodError, RecipeError
from opdkit.hooks import Now, State, Work
from opdkit.serialise import register
from opdkit.values import Value

BLOCKS = (
    "attn",
    "attention",
    "mlp",
    "feed_forward",
    "ffn",
)  # in the names of a transformer's attention and MLP weights

Accept = Literal["better", "no_worse", "always"]
Moved = Literal["blocks", "all"]
Reference = Literal["accepted", "trained"]


@dataclass(frozen=True, repr=False)
class EffOPD(Value):
    """At steps 1, 2, 4, 8, ... tries W + stride k (W - R), k = 1, ..., `tries`, and keeps the last that does not hurt.

    R is where the weights stood after the last of these steps (before training at first): with `reference` "accepted"
    after its jump, so that W - R is what training did since, as released; with "trained" before it, the paper's
    W_2^(n-1) taken at its word. The score is the accuracy on `problems` random training problems, the same ones with
    the same random numbers every time. A candidate passes with a score that is better (`accept`, as released) or
    no_worse (as the paper writes); the first that fails ends it, and the weights are then those of the last that passed,
    or W itself, bit for bit. "always" scores nothing and takes k = `tries`. `moved`: blocks are the parameters with
    attention or MLP in their names, some norms included (released); all = all that are trained. Arithmetic in
    float32; optimiser moments and schedule stay as they are. tries 0 does nothing. Defaults: the released code's.
    """

    problems: int = 50
    tries: int = 5
    stride: float = 2.0
    accept: Accept = "better"
    moved: Moved = "blocks"
    reference: Reference = "accepted"
    name: str = "jump"

    def __post_init__(self) -> None:
        for field, hint in (("accept", Accept), ("moved", Moved), ("reference", Reference)):
            if getattr(self, field) not in get_args(hint):
                raise MethodError(
                    f"EffOPD({field}={getattr(self, field)!r}): expected one of {', '.join(get_args(hint))}"
                )
        if self.problems < 1 or self.tries < 0 or self.stride <= 0:
            raise MethodError(f"EffOPD(problems={self.problems}, tries={self.tries}, stride={self.stride}): expected at least "
                              "1 problem, at least 0 tries and a stride above 0")  # fmt: skip
        if self.accept == "always" and (self.problems != 50 or self.tries == 0):
            raise MethodError(
                "EffOPD(accept='always') scores nothing and needs at least 1 try; drop `problems`, set tries"
            )

    def needs(self) -> tuple[str, ...]:
        return ("rollouts.correct",) if self.tries and self.accept != "always" else ()

    def init(self, now: Now) -> State:
        """Raises RecipeError where there are too few training problems or no such parameters."""
        if self.needs() and now.problems < self.problems:
            raise RecipeError(f"EffOPD scores on {self.problems} training problems, but there are {now.problems}; lower "
                              "`problems` or raise task.train_size")  # fmt: skip
        if not self._own(now.parameters):
            raise RecipeError(f"EffOPD(moved='blocks'): no trained parameter has {', '.join(BLOCKS)} in its name; set "
                              "moved: all")  # fmt: skip
        return {"reference": copy(self._own(now.parameters))} if self.tries else {}

    def update(self, state: State, now: Now) -> tuple[State, dict[str, float]]:
        """Jump where the step is a power of two. Logs the accepted k, both scores, and what the scoring cost."""
        if not self.tries or now.step & (now.step - 1):
            return state, {}
        began, own, reference = time.perf_counter(), self._own(now.parameters), state["reference"]
        trained = copy(own)
        numbers = self._search(now, own, trained, reference)
        numbers["seconds"] = time.perf_counter() - began
        return {"reference": copy(own) if self.reference == "accepted" else trained}, numbers

    def work(self, steps: int, parameters: Mapping[str, Tensor]) -> Work:
        """For a plan: every jump scores W and all its candidates, and holds W, R and then the new R."""
        if not self.tries:
            return Work()
        size = sum(p.nbytes for p in self._own(parameters).values())
        scored = 1 + self.tries if self.needs() else 0
        again = self.reference == "accepted"
        return Work(steps.bit_length(), scored, self.problems if scored else 0, size, size, (1 + again) * size)

    def _search(
        self, now: Now, own: Mapping[str, Tensor], trained: Mapping[str, Tensor], reference: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Leave the weights at the accepted candidate."""
        if self.accept == "always":
            place(own, trained, reference, self.stride * self.tries)
            return {"accepted": float(self.tries)}
        first = best = now.accuracy(self.problems)
        accepted = scored = 0
        for k in range(1, self.tries + 1):
            place(own, trained, reference, self.stride * k)
            found, scored = now.accuracy(self.problems), k
            if not (found > best or (self.accept == "no_worse" and found == best)):  # NaN is a failure
                break
            best, accepted = found, k
        if scored != accepted:
            place(own, trained, reference, self.stride * accepted)
        return {"accepted": float(accepted), "score_before": first, "score": best,
                "responses": float((1 + scored) * self.problems)}  # fmt: skip

    def _own(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        every = self.moved == "all"
        return {name: p for name, p in parameters.items() if every or any(word in name for word in BLOCKS)}


def copy(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory: none of an accelerator's is taken."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def place(
    parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor], reference: Mapping[str, Tensor], factor: float
) -> None:
    """Set every parameter to trained + factor (trained - reference), in float32; factor 0 is `trained`, bit for bit."""
    for name, p in parameters.items():
        w = trained[name].to(p.device)
        if factor:
            wide = w.float() if w.dtype.itemsize < 4 else w
            w = wide + factor * (wide - reference[name].to(wide))
        p.copy_(w)


register(EffOPD)
