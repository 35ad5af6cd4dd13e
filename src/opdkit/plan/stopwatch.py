"""What pieces of a job cost on this machine: timed on the engine's own code with random weights (`pilot`).

A piece that takes long is timed on part of a step: fewer prompts, then shorter texts. Its seconds are linear in its
FLOPs, through two such parts. Sampling is timed at two numbers of rows and two lengths.

Units: seconds, tokens, FLOPs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from opdkit.plan.memory import Job, Model
from opdkit.plan.passes import Products, exact_kl_flops, scoring_flops, updating_flops
from opdkit.plan.pilot import END, Pilot
from opdkit.plan.timing import Along, Decoding
from opdkit.rollouts.early import Watch
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.sampler import Keep, Mixture, Sampling, sample
from opdkit.train import loop
from opdkit.train.evaluate import reverse_kl
from opdkit.train.update import streams

LIMIT = 1.5  # seconds that the larger part of a step may take
CAP = 2e10  # FLOPs of the smaller part
COMPARED = 16  # texts on which the exact reverse KL is timed
STEPS = 8  # decoding steps that are timed
FEW = 4  # rows of the smaller batch that decodes
TRIES, ENOUGH = 3, 1.0  # a timing is repeated this often, unless it has taken so many seconds
FIXED = 0.5  # of a part's seconds at most do not grow with it: on a busy machine two parts may seem to take the same


@dataclass
class Stopwatch:
    """Costs of a job on this machine's processors."""

    job: Job
    pilot: Pilot
    loading: float  # what reading tokenizers, data and weights takes
    _known: dict[Any, Any] = field(default_factory=dict)

    def load(self) -> float | None:
        return self.loading

    def score(self) -> float:
        return self._part("score", scoring_flops(self.job))

    def update(self) -> float:
        t = self.job.recipe.train
        updates = t.minibatches * t.epochs
        return updates * self._part("update", updating_flops(self.job) / updates)

    def other(self) -> float:
        return self._part("other", scoring_flops(self.job))

    def _part(self, what: str, flops: float) -> float:
        if "step" not in self._known:
            self._known["step"] = self._steps()
        return through(self._known["step"][what], flops)

    # -----------------------------------------------------------------------------------------------------------------
    # Score and update

    def _steps(self) -> dict[str, list[tuple[float, float]]]:
        """(FLOPs, seconds) of scoring, one update and measuring of parts of a step."""
        found: dict[str, list[tuple[float, float]]] = {"score": [], "update": [], "other": []}
        small = shorter(self.job, self.pilot.depths)
        prompts = self.job.counts.prompts
        self._step(small, 1)  # what is made once
        first = self._step(small, 1)
        taken = sum(first["seconds"].values())
        sizes = {1: first}
        if prompts > 1:
            more = min(prompts, max(2, int(LIMIT / taken)))
            sizes[more] = self._step(small, more)
        for step in sizes.values():
            for what, seconds in step["seconds"].items():
                found[what].append((step["flops"][what], seconds))
        return found

    def _step(self, job: Job, prompts: int) -> dict[str, dict[str, float]]:
        """FLOPs and seconds of scoring, one update and measuring of a step of some prompts."""
        part = cut(job, prompts)
        setup = replace(self.pilot.setup, recipe=part.recipe)
        made = {name: self.pilot.rollouts(part.texts(name), name, job) for name in part.counts.rollouts}
        rollouts = {name: r for name, r in made.items() if r}
        state = job.method.initial_state()

        def score() -> Any:
            steps = {name: loop.make_step(setup, name, r, 1, state) for name, r in rollouts.items()}
            steps, _ = loop.control(setup, steps, state)
            return steps, streams(job.method, steps)

        scoring, (steps, found) = timed(score)
        updating, _ = timed(lambda: loop.update(setup, self.pilot.optimiser, rollouts, steps, found, 1))
        other, _ = timed(lambda: loop.measure(setup, rollouts, steps, state))
        flops = scoring_flops(part, self.pilot.depths)
        return {
            "seconds": {"score": scoring, "update": updating, "other": other},
            "flops": {"score": flops, "update": updating_flops(part, self.pilot.depths), "other": flops},
        }

    def exact_kl(self, prompts: int) -> float:
        if not self.job.compared:
            return 0.0
        small = shorter(self.job, self.pilot.depths)
        points = [self._compared(small, count) for count in sorted({1, min(prompts, COMPARED)})]
        return through(points, exact_kl_flops(self.job, self.job.counts.lengths.texts(prompts, 1)))

    def _compared(self, job: Job, prompts: int) -> tuple[float, float]:
        """FLOPs and seconds of the exact reverse KL to every teacher on answers to some prompts."""
        setup, texts = self.pilot.setup, job.counts.lengths.texts(prompts, 1)
        rollouts = [self.pilot.seen(text) for text in texts]
        step = flatten(rollouts, device=setup.student.device, head=setup.student.head())

        def compare() -> None:
            for name in self.job.compared:
                reverse_kl(setup, setup.teachers[name], rollouts, step)

        compare()  # what is made once
        return exact_kl_flops(job, texts, self.pilot.depths), timed(compare)[0]

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def decoding(
        self, models: Sequence[Model], group: int, rows: int, *, training: bool, along: Along | None = None
    ) -> Decoding:
        key = (*(m.architecture.name for m in models), group, rows, training, along and along[0].architecture.name)
        if key not in self._known:
            self._known[key] = self._decoding(models, group, rows, training, along)
        found: Decoding = self._known[key]
        return found

    def _decoding(
        self, models: Sequence[Model], group: int, rows: int, training: bool, along: Along | None
    ) -> Decoding:
        """Three batches: as many rows as the recipe has, few rows, and few rows with long prompts."""
        lengths, student = self.job.counts.lengths, self.pilot.setup.student
        few, room = min(FEW, rows), student.context_length - STEPS - 1
        room = min(room, *(t.context_length - STEPS - 1 for t in self.pilot.setup.teachers.values()), 2**31)
        every = [*models, *([] if along is None else [along[0]])]
        each = sum(Products.of(m).token * self.pilot.depths[m.architecture.name] for m in every)
        short = max(1, min(round(lengths.prompt), room, int(CAP / each / ceil(rows / group))))
        long = max(short, min(round(lengths.prompt) + lengths.limit, room, int(CAP / each / few)))

        def at(count: int, group: int, prompt: int) -> tuple[float, float]:
            return self._sampled(models, count, group, prompt, training, along)

        (many_read, many), (few_read, little), (long_read, far) = (
            at(rows, group, short), at(few, 1, short), at(few, 1, long),
        )  # fmt: skip
        row = max(0.0, (many - little) / (rows - few)) if rows > few else 0.0
        pair = max(0.0, (far - little) / few / (long - short)) if long > short else 0.0
        read = (long_read - few_read) / few / (long - short) if long > short else few_read / few / short
        read = max(0.0, read)
        call = max(0.0, many_read - read * ceil(rows / group) * short)
        scale = 1.0
        if any(self.pilot.depths[m.architecture.name] < 1 for m in every):
            scale = sum(p.token + p.logits for p in map(Products.of, every)) / sum(
                p.token + p.logits for p in (Products.of(m).at(self.pilot.depths[m.architecture.name]) for m in every)
            )
        own = many - row * rows
        return Decoding(call, read * scale, own * scale, row * scale, pair * scale, short + STEPS / 2)

    def _sampled(
        self, models: Sequence[Model], rows: int, group: int, prompt: int, training: bool, along: Along | None
    ) -> tuple[float, float]:
        """Seconds of a call that draws one token a row, and of each decoding step after it."""
        r, setup = self.job.recipe, self.pilot.setup
        s = r.sampling if training else r.eval
        lms = [setup.student if m is self.job.student else setup.teachers[m.architecture.name] for m in models]
        mixture = Mixture(lms[1], 0.5) if len(lms) > 1 else None
        keep = setup.keep if training else Keep()
        prompts = [(1 + i % 2, *[1] * (prompt - 1)) for i in range(ceil(rows / group))]
        top_k = r.sampling.top_k if training else 0
        watch = None
        if along is not None:  # a rule that no response meets
            rule = replace(along[1], events=2**31)
            watch = Watch(setup.teachers[along[0].architecture.name], prompts, rule, setup.method.top_list)

        def draw(new: int) -> float:
            how = Sampling(group, new, s.temperature, s.top_p, top_k, tuple(r.sampling.stop), (END,), rows)
            with setup.autocast():
                return timed(lambda: sample(lms[0], prompts, how, 0, keep, mixture=mixture, watch=watch))[0]

        draw(2)  # what is made once
        one, more = draw(1), draw(1 + STEPS)
        return one, max(0.0, more - one) / STEPS


def through(points: Sequence[tuple[float, float]], flops: float) -> float:
    """Seconds at some FLOPs, on the line through the largest two points; the last point itself where it is there.

    At no FLOPs the line is neither below 0 nor above FIXED of the last point, whatever noise says.
    """
    (x, y), rest = points[-1], points[:-1]
    if flops <= 0 or x <= 0:
        return 0.0
    if not rest or rest[-1][0] >= x or abs(flops / x - 1) < 1e-6:
        return y * flops / x
    slope = min(max((1 - FIXED) * y / x, (y - rest[-1][1]) / (x - rest[-1][0])), y / x)
    return y + slope * (flops - x)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(the least seconds of a few calls, the last result)."""
    best, spent = float("inf"), 0.0
    for _ in range(TRIES):
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > ENOUGH:
            break
    return best, result


def cut(job: Job, prompts: int) -> Job:
    """The job with fewer prompts a step, and one update."""
    share = prompts / job.counts.prompts
    rollouts = {}
    for name, count in job.counts.rollouts.items():
        group = job.group(name)
        rollouts[name] = max(1, round(count / group * share)) * group
    train = job.recipe.train.model_copy(update={"prompts_per_step": prompts, "minibatches": 1, "epochs": 1})
    counts = replace(job.counts, prompts=prompts, rollouts=rollouts)
    return replace(job, recipe=job.recipe.model_copy(update={"train": train}), counts=counts)


def shorter(job: Job, depths: dict[str, float]) -> Job:
    """The job with texts so short that a step of one prompt needs at most CAP FLOPs."""
    factor, found = 1.0, job
    while factor > 1e-3:
        part = cut(found, 1)
        if updating_flops(part, depths) + scoring_flops(part, depths) <= CAP:
            break
        factor /= 2
        readings = {key: reading.shrunk(factor) for key, reading in job.readings.items()}
        found = replace(job, counts=replace(job.counts, lengths=job.counts.lengths.shrunk(factor)), readings=readings)
    return found
