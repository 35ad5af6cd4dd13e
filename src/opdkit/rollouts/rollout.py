"""A rollout: one response with its prompt and what was recorded while it was sampled."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from opdkit.tasks.problem import Problem


@dataclass(frozen=True)
class Capture:
    """What the sampler saw at each sampled position, so that the student is not scored again (nats).

    `logp` belongs to the temperature-scaled distribution over the whole real vocabulary. `behaviour` belongs to the
    distribution that was drawn from: equal to `logp` unless top-p or top-k truncated it.
    """

    logp: Float[Tensor, " T"]
    behaviour: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"]
    top_ids: Int[Tensor, "T Kt"]
    top: Float[Tensor, "T Kt"]
    hidden: Float[Tensor, "T D"] | None = (
        None  # last hidden states, kept when a view's support needs the student's head
    )


@dataclass(frozen=True)
class Rollout:
    """One response of one source. `response_ids` includes the EOS token when the model wrote one."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str  # decoded response without special tokens; cut at a stop string
    group: int  # index of the prompt within the step
    finish: str  # "stop" (EOS), "stop_string", "length", "turns" (rollouts.tools) or "drift" (rollouts.early)
    source: str = "policy"
    trained: tuple[bool, ...] | None = None  # per response token; None = all (False: tool output)
    turns: tuple[int, ...] | None = None  # per response token, from 0; None = one turn
    calls: tuple[str, ...] | None = (
        None  # how each call of a tool went: "ok", "error" or "timeout"; None = without tools
    )
    final: str | None = None  # what the model wrote in the last of several turns, for the verifier; None = text
    version: int = 0  # optimiser steps that the sampling student had behind it
    capture: Capture | None = None  # one row per trained token
    states: Mapping[str, Float[Tensor, "T H"]] = field(default_factory=dict)  # by view: those that its model read along
    reward: float | None = None
    correct: bool | None = None
    feedback: str | None = None  # in the verifier's words
    unjudged: bool = False  # the verifier raised, and task.verifier_errors counts that as incorrect
    dropped: bool = False  # prepare steps left nothing of the batch: it is scored and logged, with weight 0

    @property
    def trained_index(self) -> list[int]:
        """Positions of the trained tokens within the response."""
        return [i for i in range(len(self.response_ids)) if self.trained is None or self.trained[i]]
