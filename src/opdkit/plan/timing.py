"""How long each phase of a run takes, put together from what single pieces of work cost.

What they cost comes from a `Costs`: measured on this machine (`stopwatch`), or derived from a data sheet (`datasheet`).
Left out: verifying answers, trackers, checkpoints, and building or downloading models that are not here.

Units: seconds, tokens. Axes: R rows that decode together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol, runtime_checkable

from opdkit.plan.memory import Job, Model
from opdkit.plan.passes import samplers, sampling_flops, scoring_flops, updating_flops
from opdkit.plan.texts import Lengths
from opdkit.sources import EarlyStop


@dataclass(frozen=True)
class Decoding:
    """What sampling with one model costs: a call, a prompt token that is read, and a decoding step, which is so much
    for itself, so much for each of its rows, and so much for each token beyond `start` that a row attends to."""

    call: float
    prompt: float
    step: float
    row: float
    pair: float
    start: float = 0.0

    def wave(self, prompts: int, rows: int, lengths: Lengths) -> float:
        """Seconds of R rows that answer some prompts, drawn until the last one ends."""
        total = self.call + self.prompt * prompts * lengths.prompt
        for t in range(1, lengths.limit):  # the first token is drawn from what reading the prompt gave
            alive = lengths.alive(t)
            beyond = max(0.0, lengths.prompt + t - self.start)
            total += (1 - (1 - alive) ** rows) * self.step + rows * alive * (self.row + self.pair * beyond)
        return total

    def seconds(self, rows: int, group: int, most: int, lengths: Lengths) -> float:
        """Of all rows, wave by wave (rollouts.sampler.sample)."""
        size = max(most // group * group, min(most, group))
        waves = [min(size, rows - start) for start in range(0, rows, size)]
        return sum(self.wave(ceil(w / group), w, lengths) for w in waves)


Along = tuple[Model, EarlyStop]  # a teacher that reads along, and its rule


@runtime_checkable
class Costs(Protocol):
    """What the pieces of a job cost, in seconds."""

    def load(self) -> float | None: ...
    def decoding(
        self, models: Sequence[Model], group: int, rows: int, *, training: bool, along: Along | None = None
    ) -> Decoding: ...
    def score(self) -> float: ...
    def update(self) -> float: ...
    def exact_kl(self, prompts: int) -> float: ...
    def other(self) -> float: ...


@dataclass(frozen=True)
class Timing:
    """One phase: seconds each time it happens, how often that is in the run, and the FLOPs of one time."""

    phase: str
    seconds: float
    times: int
    flops: float = 0.0

    @property
    def total(self) -> float:
        return self.seconds * self.times


def timings(job: Job, costs: Costs) -> tuple[Timing, ...]:
    """The phases of a run with their times. "evaluate" is the student's, "evaluate NAME" a teacher's; "hook NAME" a hook's
    accuracies on training problems."""
    steps, every = job.recipe.train.steps, job.recipe.eval.every
    found = [Timing("evaluate", _evaluating(job, costs, job.student), evaluations(steps, every))]
    if job.recipe.task.verifier != "none":
        for name, teacher in job.evaluated.items():
            found.append(Timing(f"evaluate {name}", _evaluating(job, costs, teacher), 1))
    found.append(Timing("sample", _sampling(job, costs), steps, sampling_flops(job)))
    found.append(Timing("score", costs.score(), steps, scoring_flops(job)))
    found.append(Timing("update", costs.update(), steps, updating_flops(job)))
    found.append(Timing("other", costs.other(), steps))
    for name, work in job.works.items():
        rows = ceil(work.problems / job.gpus)
        found.append(Timing(f"hook {name}", work.accuracies * _drawing(job, costs, [job.student], rows, 1), work.times))
    loading = costs.load()
    first = () if loading is None else (Timing("load", loading, 1),)
    return (*first, *(t for t in found if t.seconds > 0))


def evaluations(steps: int, every: int | None) -> int:
    """How often the student is evaluated: before the first step, every so many steps, and after the last."""
    return 1 + len({steps, *range(every, steps + 1, every)} if every else {steps})


def _sampling(job: Job, costs: Costs) -> float:
    total = 0.0
    for name, models in samplers(job).items():
        rule, follower = job.along(name), job.follower(name)
        along = None if rule is None or follower is None else (follower, rule)
        total += _drawing(job, costs, models, job.rows(name), job.group(name), along=along)
    return total


def _drawing(
    job: Job, costs: Costs, models: Sequence[Model], rows: int, group: int, lengths: Lengths | None = None,
    along: Along | None = None, training: bool = True,
) -> float:  # fmt: skip
    """Seconds of sampling some rows: in as many pieces as a response has turns, each of which reads what stands before it."""
    most = job.recipe.sampling.max_rows
    if not rows:
        return 0.0
    cost = costs.decoding(models, group, min(rows, most), training=training, along=along)
    first, *later = (lengths or job.counts.lengths).cut(job.turns)
    return cost.seconds(rows, group, most, first) + sum(cost.seconds(rows, 1, most, piece) for piece in later)


def _evaluating(job: Job, costs: Costs, model: Model) -> float:
    e, total = job.recipe.eval, 0.0
    if job.recipe.task.verifier != "none":
        rows = ceil(job.counts.held_out / job.gpus) * e.samples
        lengths = job.counts.lengths.up_to(e.max_new_tokens or job.recipe.sampling.max_new_tokens)
        total += _drawing(job, costs, [model], rows, e.samples, lengths, training=False)
    if model is job.student and e.kl_prompts and job.teachers:
        rows = ceil(min(e.kl_prompts, job.counts.held_out) / job.gpus)
        total += _drawing(job, costs, [model], rows, 1) + costs.exact_kl(rows)
    return total
