"""From rollouts without a verdict to rollouts with reward and correctness.

Left out: judges and rubrics, which are not verifiers: they need a model.
"""

from dataclasses import replace
from math import isfinite
from typing import Any

from opdkit.errors import DataError, OpdkitError
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Task, Verdict


def verify_rollouts(task: Task, rollouts: list[Rollout]) -> list[Rollout]:
    """Set reward and correct of every rollout from its text; without a verifier they stay as they are.

    A verifier that raises, or whose reward is no finite number, is a DataError naming it and the problem; with
    task.verifier_errors `incorrect` the rollout gets reward 0, counts as incorrect and is marked `unjudged`. The engine's own
    errors are raised in any case.
    """
    return [_verified(task, rollout) for rollout in rollouts]


def _verified(task: Task, rollout: Rollout) -> Rollout:
    if task.verify is None:
        return rollout
    text = rollout.text if rollout.final is None else rollout.final  # what a tool wrote is not the model's answer
    try:
        verdict = _usable(task.verify(rollout.problem, text))
    except OpdkitError:
        raise
    except (
        Exception
    ) as error:  # a verifier is the user's code: it may raise anything, and the problem id helps to find it
        if task.config.verifier_errors == "incorrect":
            return replace(rollout, reward=0.0, correct=False, unjudged=True)
        name = getattr(task.verify, "__qualname__", type(task.verify).__qualname__)  # a callable object has no name
        raise DataError(
            f"verifier {name} of task '{task.name}' failed on problem {rollout.problem.id}: "
            f"{type(error).__name__}: {error}; response: {text[:80]!r}"
        ) from error
    return replace(rollout, reward=verdict.reward, correct=verdict.correct, feedback=verdict.feedback)


def _usable(verdict: Any) -> Verdict:
    """What a verifier returned, if rewards can be learnt from it. Raises TypeError or ValueError."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"it returned a {type(verdict).__name__}, expected a Verdict")
    if not isfinite(verdict.reward):
        raise ValueError(f"its reward is {verdict.reward}, expected a finite number")
    return verdict
