"""Runs a method's hooks, and gives them what they may use: the trained parameters and an accuracy on training problems.

Left out: hooks while processes share the student (`train.checks.check_processes` refuses them).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from opdkit.errors import NonFiniteError
from opdkit.hooks import Now
from opdkit.rewards.verify import verify_rollouts
from opdkit.train.evaluate import sample_mine
from opdkit.train.setup import Setup, derive_seed
from opdkit.train.sharding import whole


def first_states(setup: Setup) -> dict[str, dict[str, Any]]:
    """What the controllers and hooks remember before the first step, by their names."""
    states = setup.method.initial_state()
    if setup.method.after_update:
        now = look(setup, 0, {})
        states |= {hook.name: hook.init(now) for hook in setup.method.after_update}
    return states


def run_hooks(setup: Setup, step: int, metrics: Mapping[str, float], state: dict[str, Any]) -> dict[str, float]:
    """Run every hook and put its new state into `state`. Returns what they log."""
    found: dict[str, float] = {}
    if setup.method.after_update:
        now = look(setup, step, metrics)
        for hook in setup.method.after_update:
            state[hook.name], numbers = hook.update(state[hook.name], now)
            found |= {f"{hook.name}/{key}": value for key, value in numbers.items()}
    return found


def look(setup: Setup, step: int, metrics: Mapping[str, float]) -> Now:
    trained = {name: p for name, p in setup.student.model.named_parameters() if p.requires_grad}
    return Now(step, metrics, trained, len(setup.train), partial(training_accuracy, setup))


def training_accuracy(setup: Setup, count: int) -> float:
    """The student's accuracy on `count` training problems, one response to each; NaN where its numbers are not finite.

    Problems and random numbers depend on the run's seed only: two calls differ by the weights alone, and nothing of the
    training's random numbers is used. It samples as training does.
    """
    seed, everyone = derive_seed(setup.recipe.seed, "training accuracy"), setup.processes
    chosen = Random(seed).sample(range(len(setup.train)), count)
    rollouts, failed = [], 0
    with whole(setup.student), setup.autocast():
        how = replace(setup.sampling, group=1)
        try:
            rollouts = sample_mine(setup, setup.student, [setup.train[i] for i in chosen], how, seed)
        except NonFiniteError:
            failed = 1
    if everyone.largest(failed):  # all processes hear of it, so none of them waits for the others
        return float("nan")
    right = sum(bool(r.correct) for r in verify_rollouts(setup.task, rollouts))
    return everyone.total([float(right)])[0] / count
