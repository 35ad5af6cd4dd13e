"""One entry for all sources: from `TaskConfig` to a `Task` with its verifier.

Left out: tokens (`prompts`) and running the verifier (`rewards.verify`).
"""

from collections.abc import Sequence
from dataclasses import replace

from opdkit.config import SOURCE, TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.tasks.problem import Problem, Task, Verifier

_NO_EFFECT = {
    "file": ("name", "split", "eval_split", "settings"),
    "dataset": ("eval_path", "settings"),
    "reasoning_gym": ("path", "eval_path", "split", "eval_split", "columns", "format"),
    "testbed": ("path", "eval_path", "split", "eval_split", "columns", "format"),
    "verifiers": ("name", "eval_path", "split", "eval_split", "columns", "format", "verifier"),
}


def load_task(config: TaskConfig) -> Task:
    """Load the task of a recipe: training and held-out problems without a common prompt, and the verifier.

    Raises RecipeError for a setting that is wrong or has no effect, DataError for data that cannot be used.
    """
    check_settings(config)
    task = _source(config)
    verify = _verifier(task, config)
    if verify is None and config.verifier_errors != "stop":
        raise RecipeError(f"task.verifier_errors = {config.verifier_errors!r} has no effect: task '{task.name}' has no "
                          "verifier; remove it")  # fmt: skip
    return replace(task, verify=verify, config=config)


def check_settings(config: TaskConfig) -> None:
    """Raise RecipeError when a setting is missing or would have no effect with this kind of task."""
    # A recipe that was written out with its defaults must load again, so the value counts, not whether it was set.
    changed = {name for name, info in TaskConfig.model_fields.items() if getattr(config, name) != info.get_default()}
    for name in _NO_EFFECT[config.kind]:
        if name in changed:
            raise RecipeError(
                f"task.{name} = {getattr(config, name)!r} has no effect with task.kind '{config.kind}'; remove it"
            )
    if getattr(config, (needs := SOURCE[config.kind])) is None:
        raise RecipeError(f"task.kind '{config.kind}' needs task.{needs}")
    if config.upsample_shape is not None and config.upsample is None:
        raise RecipeError(f"task.upsample_shape = {config.upsample_shape!r} has no effect without task.upsample")
    if config.template == "plain" and config.system is not None:
        raise RecipeError("task.system has no effect with task.template 'plain'; remove it or put it into the prompts")
    if config.template == "plain" and config.template_args:
        raise RecipeError(
            f"task.template_args = {config.template_args} has no effect with task.template 'plain'; remove it"
        )


def _source(config: TaskConfig) -> Task:
    if config.kind == "file":
        from opdkit.tasks.files import file_task

        return file_task(config)
    if config.kind == "dataset":
        from opdkit.tasks.hub import dataset_task

        return dataset_task(config)
    if config.kind == "reasoning_gym":
        from opdkit.tasks.gym import gym_task

        return gym_task(config)
    if config.kind == "verifiers":
        from opdkit.tasks.verifiers_env import verifiers_task

        return verifiers_task(config)
    from opdkit.testbed.tasks import testbed_task

    return testbed_task(config)


def _verifier(task: Task, config: TaskConfig) -> Verifier | None:
    """`auto` is the task's own, else math where there are answers, else none."""
    from opdkit.rewards.answers import check_math_answers, verify_exact, verify_math

    if config.verifier == "none":
        return None
    if config.verifier == "auto" and task.verify is not None:
        return task.verify
    # A generated training set is not walked through: its answers are like those of the held-out problems.
    listed = [*task.eval, *(task.train if isinstance(task.train, list | tuple) else ())]
    without = [problem for problem in listed if problem.answer is None or not problem.answer.strip()]
    if config.verifier == "auto" and len(without) == len(listed):
        return None
    if without:
        raise DataError(_missing_answers(task, config, without, listed))
    if config.verifier == "exact":
        return verify_exact
    check_math_answers(listed)
    return verify_math


def _missing_answers(task: Task, config: TaskConfig, without: Sequence[Problem], listed: Sequence[Problem]) -> str:
    return (
        f"task '{task.name}': {len(without)} of {len(listed)} problems have no answer (first: {without[0].id}), and "
        f"task.verifier '{config.verifier}' compares with one; map the column with task.columns: {{answer: NAME}}, "
        "complete the rows, or set task.verifier: none"
    )
