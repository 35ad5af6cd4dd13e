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
from opdkit.metrics import Clock, peak_memory_mb, step_metrics
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sources import roll_out
from opdkit.step import Scores, Step
from opdkit.support import Full, Sampled
from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint, load_weights, save_checkpoint
from opdkit.train.data import PromptOrder
from opdkit.train.evaluate import evaluate, summary
from opdkit.train.progress import Progress
from opdkit.train.record import run_information, save_batch, save_rollouts
from opdkit.train.run import Run
from opdkit.train.setup import Setup, derive_seed, describe, set_up, split_prompts
from opdkit.train.state import rng_state, set_rng_state
from opdkit.train.trackers import Trackers, truncate_after
from opdkit.train.update import micro_steps, streams
from opdkit.views.local import score


def dry_run(recipe: Recipe) -> str:
    """Load and check everything and return the resolved plan; nothing is written or trained."""
    return describe(set_up(recipe))


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Run a recipe to its end and return the run folder.

    Raises OpdkitError for whatever does not fit, NonFiniteError for NaN or infinite values (a batch that could be
    sampled is saved), and SystemExit after SIGINT or SIGTERM, once the step is finished and saved.
    """
    setup = set_up(recipe)
    r, method, student = setup.recipe, setup.method, setup.student
    with Run.open(r.output, recipe, resume=resume) as run:
        order = PromptOrder(len(setup.train), r.seed)
        state = {hook.name: hook.init() for hook in method.after_update}
        start = 0
        torch.manual_seed(derive_seed(r.seed, "torch"))
        if resume and (newest := latest_checkpoint(run.path)):
            saved = load_checkpoint(newest)
            load_weights(student.model, newest)
            start, order, state = restore(setup, saved)
        truncate_after(run.path, start)
        run.update(finished=None, **run_information(setup))
        began = datetime.now(UTC)
        before = float(run.info.get("seconds") or 0.0) if start else 0.0
        stop = StopSignal()

        with Trackers(run.path, r.log.trackers, r.model_dump(mode="json")) as trackers, stop, \
                Progress(r.train.steps, start) as progress:  # fmt: skip
            if start == 0:
                for lm in [student, *(setup.teachers.values() if r.eval.teacher else ())]:
                    trackers.evaluation(record := evaluate(setup, lm, 0))
                    progress.say(f"before: {summary(record)}")

            for step in range(start + 1, r.train.steps + 1):
                clock = Clock()
                with clock("sample"):
                    rollouts = sample_step(setup, order, step)
                with clock("score"), keep_batch(run, step, rollouts):
                    steps = {name: make_step(setup, name, rollouts[name], step, state) for name in rollouts}
                    found = streams(method, steps, r.train.reduction)
                with clock("update"), keep_batch(run, step, rollouts, steps):
                    numbers = update(setup, rollouts, steps, found)
                for hook in method.after_update:
                    state[hook.name] = hook.update(state[hook.name], numbers)
                numbers |= measure(setup, rollouts, steps)
                numbers |= clock.read() | {"peak_memory_mb": peak_memory_mb()}
                numbers["tokens_per_second"] = numbers["tokens"] / numbers["seconds/step"]
                trackers.log(step, numbers)
                progress.update(step, numbers)
                last = step == r.train.steps or stop.received
                if step % r.log.rollouts_every == 0 or last or step == 1:
                    save_rollouts(setup, run.path, step, rollouts, steps, found)
                if step == r.train.steps or (r.eval.every and step % r.eval.every == 0):
                    trackers.evaluation(record := evaluate(setup, student, step))
                    progress.say(f"step {step}: {summary(record)}")
                if last or (r.train.checkpoint_every and step % r.train.checkpoint_every == 0):
                    checkpoint(setup, run, step, order, state)
                    run.update(step=step, seconds=before + (datetime.now(UTC) - began).total_seconds())
                if stop.received:
                    progress.say(f"stopped after step {step}, saved in {run.path}; go on with --resume")
                    break
        if stop.received:
            raise SystemExit(128 + stop.received)
        run.update(finished=datetime.now(UTC).isoformat(timespec="seconds"))
        return run.path


# ---------------------------------------------------------------------------------------------------------------------
# The steps of the loop


def sample_step(setup: Setup, order: PromptOrder, step: int) -> dict[str, list[Rollout]]:
    """Draw the step's prompts, roll them out, run the method's prepare steps and verify."""
    r, method = setup.recipe, setup.method
    sources: dict[str, tuple[object, Any]] = {}
    for name, count in split_prompts(method, r.train.prompts_per_step).items():
        sources[name] = (method.rollouts[name], [setup.train[i] for i in order.take(count)])
    seed = derive_seed(r.seed, "sample", step)
    with setup.accelerator.autocast():
        found = roll_out(sources, setup.student, setup.task, setup.sampling, setup.keep, seed, step - 1)
    for name, rollouts in found.items():
        verified = verify_rollouts(setup.task, rollouts) if name == "policy" else rollouts
        for prepare in method.prepare:
            verified = prepare(verified)
        found[name] = verified
    return found


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
    )
    budget, k = r.train.score_tokens, min(r.log.top_k, student.head().size)
    views: dict[str, Scores] = dict(flat.views)
    with setup.accelerator.autocast():
        missing = "student" not in views and setup.method.reads_student(source)
        if missing or (r.sampling.rescore and "student" in views):
            support = Full() if setup.needs_student_head else Sampled()
            views["student"] = score(student, rollouts, flat, support, budget=budget, top_k=setup.keep.top_k)
            flat = replace(flat, views=views)
        for name, view in setup.method.views.items():
            views[name] = score(setup.teachers[view.model], rollouts, flat, view.support, budget=budget, top_k=k)
    return replace(flat, views=views)


def update(setup: Setup, rollouts: Any, steps: Mapping[str, Step], found: Any) -> dict[str, float]:
    """One optimiser step. Raises NonFiniteError, with the weights untouched, when loss or gradient is not finite."""
    r, model = setup.recipe, setup.student.model
    setup.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    model.train()
    with setup.accelerator.autocast():
        for loss in micro_steps(setup.student, rollouts, steps, found, r.train.microbatch_tokens, r.train.head_chunk):
            setup.accelerator.backward(loss)
            total += float(loss.detach())
    model.eval()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), r.optim.grad_clip).item()
    if not (abs(total) < float("inf") and norm < float("inf")):
        raise NonFiniteError(f"loss is {total} and gradient norm {norm}; the weights are unchanged. Look at the saved batch, "
                             "lower optim.lr or use train.precision: fp32")  # fmt: skip
    rate = float(setup.scheduler.get_last_lr()[0])
    setup.optimizer.step()
    setup.scheduler.step()
    return {"loss": total, "grad_norm": norm, "lr": rate}


def measure(setup: Setup, rollouts: Mapping[str, list[Rollout]], steps: Mapping[str, Step]) -> dict[str, float]:
    """The step's metrics: of the student's own rollouts where it has any, else of the data's."""
    name = "policy" if "policy" in steps else next(iter(steps))
    found = step_metrics(steps[name], rollouts[name], setup.recipe.log.top_k, setup.student.head().size)
    found["tokens"] = sum(step.tokens.shape[0] for step in steps.values())
    return found


def checkpoint(setup: Setup, run: Run, step: int, order: PromptOrder, state: dict[str, Any]) -> None:
    """Save the student and everything that the next step depends on."""
    trainer = {
        "step": step,
        "optimizer": setup.optimizer.state_dict(),
        "scheduler": setup.scheduler.state_dict(),
        "rng": rng_state(),
        "order": order.state(),
        "method": state,
    }
    keep = setup.recipe.train.keep_checkpoints
    save_checkpoint(run, step, setup.student.model, setup.student.tokenizer, trainer, keep=keep)


def restore(setup: Setup, saved: dict[str, Any]) -> tuple[int, PromptOrder, dict[str, Any]]:
    """Put a checkpoint's state back. Returns (finished steps, prompt order, method state)."""
    setup.optimizer.load_state_dict(saved["optimizer"])
    setup.scheduler.load_state_dict(saved["scheduler"])
    set_rng_state(saved["rng"])
    order = PromptOrder.restore(len(setup.train), setup.recipe.seed, saved["order"])
    return int(saved["step"]), order, dict(saved["method"])


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
