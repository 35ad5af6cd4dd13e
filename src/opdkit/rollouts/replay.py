"""The replay buffer: the newest responses that the student sampled, drawn again in later steps (2402.03898 section 3.2).

What is kept is text and token ids. Captures are dropped, because they belong to an older student: a replayed rollout is
scored again. Left out: priorities, and replaying prompts instead of responses.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opdkit.errors import RunError
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Problem


class ReplayBuffer:
    """The newest `capacity` rollouts, in the order in which they were added."""

    def __init__(self, capacity: int) -> None:
        self.kept: deque[Rollout] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.kept)

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Keep rollouts, without their captures; the oldest ones leave."""
        self.kept.extend(replace(r, capture=None, states={}) for r in rollouts)

    def draw(self, n: int, seed: int) -> list[Rollout]:
        """n different rollouts, by the seed alone; none at all where fewer than n are kept."""
        if len(self.kept) < n:
            return []
        order = torch.randperm(len(self.kept), generator=torch.Generator().manual_seed(seed))
        return [self.kept[i] for i in order[:n].tolist()]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON types; of a problem only its id."""
        return {"capacity": self.kept.maxlen, "rollouts": [_to_json(r) for r in self.kept]}

    @classmethod
    def restore(cls, state: Mapping[str, Any], problems: Mapping[str, Problem]) -> "ReplayBuffer":
        """The buffer as it was, its problems looked up by id. Raises RunError for a problem that the task lacks."""
        buffer = cls(state["capacity"])
        for saved in state["rollouts"]:
            if saved["problem"] not in problems:
                raise RunError(
                    f"the checkpoint replays a response to problem '{saved['problem']}', which the task does not have; "
                    "resume with the same task, or start a new run with another output=..."
                )
            buffer.kept.append(_from_json(saved, problems[saved["problem"]]))
        return buffer


PLAIN = ("text", "final", "group", "finish", "source", "version", "reward", "correct", "feedback")
LISTS = ("prompt_ids", "response_ids", "trained", "turns", "calls")


def _to_json(rollout: Rollout) -> dict[str, Any]:
    saved: dict[str, Any] = {name: getattr(rollout, name) for name in PLAIN}
    for name in LISTS:
        value = getattr(rollout, name)
        saved[name] = None if value is None else list(value)
    return saved | {"problem": rollout.problem.id}


def _from_json(saved: Mapping[str, Any], problem: Problem) -> Rollout:
    found: dict[str, Any] = {name: saved[name] for name in PLAIN}
    for name in LISTS:
        found[name] = None if saved[name] is None else tuple(saved[name])
    return Rollout(problem, **found)
