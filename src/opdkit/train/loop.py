"""The training loop: one function, read from top to bottom.

prompts -> rollouts -> prepare and verify -> flatten -> score the views -> signals and weights -> micro-batched update
-> hooks, metrics, evaluation, checkpoint. It knows methods only as `Method` values.
"""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from opdkit.config import Recipe
from opdkit.errors import NonFiniteError
from opdkit.metrics import Clock, averages, peak_memory_mb, step_metrics, summed, watched
from opdkit.rollouts.flatten import flags, flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.sources import OnPolicy
from opdkit.step import Scores, Step
from opdkit.support import Full, Sampled
from opdkit.train.ahead import without_states
from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint, load_weights, save_checkpoint
from opdkit.train.evaluate import evaluate, summary
from opdkit.train.hooks import first_states, run_hooks
from opdkit.train.optimise import Optimiser
from opdkit.train.progress import Progress
from opdkit.train.record import check_method, run_information, save_batch, save_rollouts
from opdkit.train.rolling import Rolling
from opdkit.train.run import Run
from opdkit.train.setup import Setup, derive_seed, notes, set_up
from opdkit.train.sharding import shard, whole, whole_weights
from opdkit.train.state import rng_state, set_rng_state
from opdkit.train.trackers import Trackers
from opdkit.train.update import Stream, coefficients, expected_batches, losses, parts, plan, streams
from opdkit.views.batches import flat_index
from opdkit.views.local import score
from opdkit.views.route import merge


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Run a recipe to its end and return the run folder; one call in each of the run's processes.

    Raises OpdkitError for whatever does not fit, NonFiniteError for NaN or infinite values (a batch that could be
    sampled is saved), and SystemExit after SIGINT or SIGTERM, once the step is finished and saved.
    """
    setup = set_up(recipe)
    r, method, student, everyone = setup.recipe, setup.method, setup.student, setup.processes
    with open_run(setup, resume) as run:
        start, optimiser, rolling, state = begin(setup, run, resume)
        began, before = datetime.now(UTC), float(run.info.get("seconds") or 0.0) if start else 0.0
        run.begin(start, finished=None, **run_information(setup))
        stop = StopSignal()

        with Trackers(run.path, r.log.trackers, r.model_dump(mode="json"), active=everyone.main) as trackers, stop, \
                Progress(r.train.steps, start, active=everyone.main) as progress:  # fmt: skip
            for note in notes(setup):
                progress.say(note)
            if start == 0:
                for lm in [student, *setup.evaluated]:
                    trackers.evaluation(record := evaluate(setup, lm, 0))
                    progress.say(f"before: {summary(record)}")

            for step in range(start + 1, r.train.steps + 1):
                clock = Clock()
                with whole(student):
                    with clock("sample"):
                        rollouts = rolling.step(step, state)
                    with clock("score"), keep_batch(run, step, rollouts):
                        steps = {name: make_step(setup, name, rollouts[name], step, state) for name in rollouts}
                        rollouts = {name: without_states(found) for name, found in rollouts.items()}  # they are scored
                        steps, upcoming = control(setup, steps, state)
                        found = streams(method, steps)
                with clock("update"), keep_batch(run, step, rollouts, steps):
                    numbers = update(setup, optimiser, rollouts, steps, found, step)
                state |= upcoming
                numbers |= run_hooks(setup, step, numbers, state)
                numbers |= measure(setup, rollouts, steps, state, rolling.judged)
                numbers |= clock.read() | {"peak_memory_mb": peak_memory_mb()}
                numbers["tokens_per_second"] = numbers["tokens"] / numbers["seconds/step"]
                trackers.log(step, numbers)
                progress.update(step, numbers)
                stopping = everyone.largest(stop.received)
                last = step == r.train.steps or stopping
                if everyone.main and (step % r.log.rollouts_every == 0 or last or step == 1):
                    save_rollouts(setup, run.path, step, rollouts, steps, found)
                if step == r.train.steps or (r.eval.every and step % r.eval.every == 0):
                    trackers.evaluation(record := evaluate(setup, student, step))
                    progress.say(f"step {step}: {summary(record)}")
                if last or (r.train.checkpoint_every and step % r.train.checkpoint_every == 0):
                    checkpoint(setup, run, optimiser, rolling, step, state)
                    run.update(step=step, seconds=before + (datetime.now(UTC) - began).total_seconds())
                if stopping:
                    progress.say(f"stopped after step {step}, saved in {run.path}; go on with --resume")
                    raise SystemExit(128 + stopping)
        run.update(finished=datetime.now(UTC).isoformat(timespec="seconds"))
        return run.path


# ---------------------------------------------------------------------------------------------------------------------
# The steps of the loop


def open_run(setup: Setup, resume: bool) -> Run:
    """The run folder: the main process opens it, the others follow what it says."""
    recipe, everyone = setup.recipe, setup.processes
    if everyone.main:
        run = Run.open(recipe.output, recipe, resume=resume)
        everyone.share(run.info)
        return run
    return Run.follow(recipe.output, recipe, everyone.share({}))


def begin(setup: Setup, run: Run, resume: bool) -> tuple[int, Optimiser, Rolling, dict[str, Any]]:
    """(finished steps, optimiser, rollouts, method state) at the start, or where the newest checkpoint was saved."""
    student, everyone = setup.student, setup.processes
    newest = everyone.share(latest_checkpoint(run.path) if resume else None)
    saved = load_checkpoint(newest) if newest else None
    if saved is not None:
        check_method(setup, run.info)
    if newest:  # before the student is divided: checkpoints hold it whole
        load_weights(student.saved, newest)
    if setup.recipe.train.sharding == "fsdp2":
        shard(student, everyone)
    optimiser, rolling = Optimiser(setup.recipe, student, everyone), Rolling(setup)
    torch.manual_seed(derive_seed(setup.recipe.seed, "torch"))
    if saved is None:
        return 0, optimiser, rolling, first_states(setup)
    optimiser.restore(saved)
    rolling.restore(saved)
    setup.averages.restore(saved)
    set_rng_state(saved["rng"])
    return int(saved["step"]), optimiser, rolling, dict(saved["method"])


@torch.no_grad()
def make_step(setup: Setup, source: str, rollouts: list[Rollout], step: int, state: Mapping[str, Any]) -> Step:
    """Flatten one source's rollouts and score every view on them."""
    r, student = setup.recipe, setup.student
    flat = flatten(
        rollouts,
        device=student.device,
        horizon=r.sampling.max_new_tokens,
        progress=(step - 1) / r.train.steps,
        state=dict(state),
        head=student.head(),
        domains=list(dict.fromkeys([*setup.domains, *(r.problem.domain for r in rollouts)])),
    )
    budget, k = r.train.score_tokens, min(max(r.log.top_k, setup.method.top_list), student.head().size)
    views: dict[str, Scores] = dict(flat.views)
    with setup.autocast():
        missing = "student" not in views and setup.method.reads_student(source)
        if missing or (r.sampling.rescore and "student" in views):
            support = Full() if setup.keep.hidden else Sampled()
            views["student"] = score(student, rollouts, flat, support, budget=budget, top_k=setup.keep.top_k)
            flat = replace(flat, views=views)
        for name, view in setup.method.views.items():
            told, parts, bad = setup.told(view, rollouts), [], r.train.bad_scores
            for lm, at, seen in setup.readers(name, view, rollouts, told):
                scores = score(lm, seen, flat, view.support, budget=budget, top_k=k, at=at, bad=bad, view=name)
                parts.append((flat_index(flat, at), scores))
            views[name] = merge(parts)
            if told is not None:
                views[name] = replace(views[name], informed=flags([t is not None for t in told], flat))
    return replace(flat, views=views)


@torch.no_grad()
def control(
    setup: Setup, steps: Mapping[str, Step], state: dict[str, Any]
) -> tuple[dict[str, Step], dict[str, dict[str, Any]]]:
    """Move the controllers' states by the batch: (steps that see the new states of "before", new states of "after").

    `state` takes the "before" states at once; the others are due when the update is done.
    """
    upcoming: dict[str, dict[str, Any]] = {}
    for controller in setup.method.controllers:
        values = setup.processes.gather([controller.measure(steps[controller.on]).cpu()])
        new = controller.update(dict(state[controller.name]), torch.cat(values))
        (state if controller.when == "before" else upcoming)[controller.name] = new
    return {name: replace(step, state=dict(state)) for name, step in steps.items()}, upcoming


def update(
    setup: Setup, optimiser: Optimiser, rollouts: Mapping[str, list[Rollout]], steps: Mapping[str, Step],
    found: Mapping[str, list[Stream]], step: int,
) -> dict[str, float]:  # fmt: skip
    """The step's optimiser updates: every epoch goes through its mini-batches. Returns the updates' mean numbers."""
    t, model, everyone = setup.recipe.train, setup.student, setup.processes
    numbers: list[dict[str, float]] = []
    model.model.train()
    for epoch in range(t.epochs):
        seed = derive_seed(setup.recipe.seed, "minibatches", step, epoch)
        for part in parts(rollouts, t.minibatches, t.prompts_per_step, seed):
            coefs = coefficients(found, steps, part, everyone, t.reduction)
            batches = plan(setup.student, rollouts, steps, found, coefs, part, t.microbatch_tokens)
            expected = expected_batches(model, batches, everyone)
            with setup.autocast():
                shares = losses(model, batches, expected, t.head_chunk, t.head_kernel)
                numbers.append(optimiser.step(shares, expected))
            setup.averages.update()
    model.model.eval()
    mean = {key: sum(n[key] for n in numbers) / len(numbers) for key in numbers[0]}
    return mean | {"lr": numbers[-1]["lr"]}


@torch.no_grad()
def measure(
    setup: Setup, rollouts: Mapping[str, list[Rollout]], steps: Mapping[str, Step], state: Mapping[str, Any],
    judged: list[Rollout] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The step's metrics over all processes: of the student's own rollouts where it has any, else of the data's.

    `judged` are the source "policy"'s rollouts before the prepare steps; rewards and lengths are theirs.
    """
    name = "policy" if "policy" in steps else next(iter(steps))
    judged = judged if name == "policy" and judged else rollouts[name]
    size, top_k = setup.student.head().size, setup.recipe.log.top_k
    own = step_metrics(steps[name], rollouts[name], top_k, size, setup.domains, judged)
    for label, piece in setup.method.watch.items():
        own |= watched(label, piece, steps["policy"])
    if setup.method.prepare and "reward" in own:
        own["prepared_reward"] = (sum(r.reward or 0.0 for r in rollouts[name]), float(len(rollouts[name])))
    own["tokens"] = (float(sum(step.tokens.shape[0] for step in steps.values())), 1.0)
    own |= {key: (float(count), 1.0) for key, count in counts(setup, rollouts[name], steps[name], judged).items()}
    means = summed(setup.processes.gather([own]))
    sums = [key for key in means if key == "tokens" or key.startswith("count/")]
    found = averages(means) | {key: means[key][0] for key in sums}
    if not found.get("sampler_gap", 1.0):  # nothing was truncated or scored again
        del found["sampler_gap"]
    for c in setup.method.controllers:
        found |= {f"{c.name}/{key}": value for key, value in c.metrics(state[c.name]).items()}
    return found


def counts(setup: Setup, rollouts: list[Rollout], step: Step, judged: list[Rollout]) -> dict[str, int]:
    """What was left out of a step, where the recipe lets anything be left out."""
    found = {}
    if any(isinstance(source, OnPolicy) and source.stop_early for source in setup.method.rollouts.values()):
        found["count/stopped_early"] = sum(r.finish == "drift" for r in judged)
    if setup.method.prepare:
        found["count/dropped_rollouts"] = len(judged) - sum(not r.dropped for r in rollouts)
    if setup.recipe.task.verifier_errors == "incorrect":
        found["count/verifier_errors"] = sum(r.unjudged for r in judged)
    if setup.recipe.train.bad_scores == "mask":
        bad = [step.views[name].bad for name in setup.method.views]
        found["count/bad_scores"] = sum(int(b.sum()) for b in bad if b is not None)
    return found


def checkpoint(
    setup: Setup, run: Run, optimiser: Optimiser, rolling: Rolling, step: int, state: dict[str, Any]
) -> None:
    """Save the student and everything that the next step depends on; the main process writes."""
    trainer = optimiser.state() | rolling.state() | setup.averages.state()
    trainer |= {"step": step, "rng": rng_state(), "method": state}
    weights = whole_weights(setup.student)
    if setup.processes.main:
        keep = setup.recipe.train.keep_checkpoints
        save_checkpoint(run, step, setup.student.saved, setup.student.tokenizer, trainer, keep=keep, weights=weights)
    setup.processes.wait()


@contextmanager
def keep_batch(run: Run, step: int, rollouts: Any, steps: Mapping[str, Step] | None = None) -> Iterator[None]:
    """When the block meets NaN or infinity, save the offending batch and say where."""
    try:
        yield
    except NonFiniteError as error:
        path = save_batch(run.path, step, rollouts, steps)
        raise NonFiniteError(f"step {step}: {error} (batch saved in {path})") from error


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag, so that the step ends and is saved; a second one stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
