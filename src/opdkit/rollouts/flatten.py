"""From rollouts to a step: put every trained token on one flat axis."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from opdkit.errors import DataError
from opdkit.head import Head, HeadRows
from opdkit.rollouts.rollout import Rollout
from opdkit.step import Layout, Scores, Step


def flatten(
    rollouts: Sequence[Rollout], *, device: torch.device | str = "cpu", horizon: int = 0, progress: float = 0.0,
    state: dict[str, Any] | None = None, head: Head | None = None, domains: Sequence[str] = (),
) -> Step:  # fmt: skip
    """Make the step of one source. `head` is the student's, for captures that kept hidden states.

    Raises DataError when no rollout has a trained token.
    """
    tokens, seq, turn, turns = [], [], [], 0
    for s, rollout in enumerate(rollouts):
        index = rollout.trained_index
        tokens += [rollout.response_ids[i] for i in index]
        seq += [s] * len(index)
        for _, run in groupby(index, key=lambda i, r=rollout: 0 if r.turns is None else r.turns[i]):  # type: ignore[misc]
            turn += [turns] * len(list(run))
            turns += 1
    if not tokens:
        raise DataError("none of the step's rollouts has a trained token; check the responses of the data set")
    group = _renumber([r.group for r in rollouts])
    layout = Layout(*(torch.tensor(x, dtype=torch.long, device=device) for x in (seq, turn, group)))
    known, dropped = all(r.reward is not None for r in rollouts), [r.dropped for r in rollouts]
    return Step(
        layout=layout,
        tokens=torch.tensor(tokens, dtype=torch.long, device=device),
        views=captured(rollouts, head),
        reward=torch.tensor([float(r.reward or 0.0) for r in rollouts], device=device) if known else None,
        correct=torch.tensor([bool(r.correct) for r in rollouts], device=device) if known else None,
        domain=torch.tensor([domains.index(r.problem.domain) for r in rollouts], device=device) if domains else None,
        dropped=torch.tensor(dropped, device=device) if any(dropped) else None,
        horizon=horizon,
        progress=progress,
        state=state or {},
    )


def flags(of_each: Sequence[bool], step: Step) -> Bool[Tensor, " N"]:
    """Give every token of a step the flag of its rollout."""
    return torch.tensor(of_each, device=step.tokens.device)[step.layout.seq]


def captured(rollouts: Sequence[Rollout], head: Head | None) -> dict[str, Scores]:
    """The views "student" and "behaviour" from what the sampler recorded; empty when any rollout has no capture."""
    found = [r.capture for r in rollouts]
    if any(c is None for c in found):
        return {}

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(c, name) for c in found])

    full = None
    if head is not None and all(c is not None and c.hidden is not None for c in found):
        full = HeadRows(cat("hidden"), head)
    student = Scores(cat("logp"), cat("entropy"), cat("top_ids"), cat("top"), None, full)
    return {"student": student, "behaviour": Scores(cat("behaviour"))}


def _renumber(groups: Sequence[int]) -> list[int]:
    """Groups as 0, 1, 2, ... in order of appearance."""
    seen: dict[int, int] = {}
    return [seen.setdefault(g, len(seen)) for g in groups]
