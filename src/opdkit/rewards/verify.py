"""From rollouts without a verdict to rollouts with reward and correctness.

Left out: judges and rubrics, which are not verifiers: they need a model.
"""

from dataclasses import replace

from opdkit.errors import DataError, OpdkitError
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Task


def verify_rollouts(task: Task, rollouts: list[Rollout]) -> list[Rollout]:
    """Set reward and correct of every rollout from its text; without a verifier they stay as they are.

    Raises DataError naming the verifier and the problem when the verifier raises.
    """
    return [_verified(task, rollout) for rollout in rollouts]


def _verified(task: Task, rollout: Rollout) -> Rollout:
    if task.verify is None:
        return rollout
    try:
        verdict = task.verify(rollout.problem, rollout.text)
    except OpdkitError:
        raise
    except (
        Exception
    ) as error:  # a verifier is the user's code: it may raise anything, and the problem id helps to find it
        name = getattr(task.verify, "__qualname__", type(task.verify).__qualname__)  # a callable object has no name
        raise DataError(
            f"verifier {name} of task '{task.name}' failed on problem {rollout.problem.id}: "
            f"{type(error).__name__}: {error}; response: {rollout.text[:80]!r}"
        ) from error
    return replace(rollout, reward=verdict.reward, correct=verdict.correct)
