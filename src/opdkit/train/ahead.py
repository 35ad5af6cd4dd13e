"""Teachers that read finished responses while the student samples the next ones (`train.score_ahead`).

Axes: T trained tokens of one response, H columns that a teacher's head reads.

The sampler works in waves. A finished wave goes to a second thread, which runs the forward passes of the views' models
over it; the hidden states are put into the rollouts under the views' names, where scoring finds them
(`views.local.hidden_rows`) and applies the heads. What a model reads is made in the main thread, so tokenizers are never
shared. On a CUDA device the second thread has a stream of its own: it begins behind everything that was launched before
the wave was handed over, and the main stream waits for it before it reads the states. Left out: views that read rewards
or switch the student's adapters (`obstacles`), responses that end before their wave does, sampling with tools.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.config import Recipe
from opdkit.errors import RecipeError
from opdkit.method import Method, View
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import wave_rows
from opdkit.sources import OnPolicy, TeacherSamples
from opdkit.views.batches import batches

States = list[Float[Tensor, "T H"]]
Reading = tuple[
    LanguageModel, list[int], list[Rollout]
]  # a model, its rollouts' numbers, the rollouts as it reads them


@dataclass(frozen=True)
class _Job:
    """One model's passes over its rollouts of a wave, for a view; `numbers` count within the source."""

    source: str
    view: str
    numbers: Sequence[int]
    found: Future[tuple[States, Any]]  # with the event after which they are there, on a CUDA device


class Ahead:
    """The second thread, from the first wave of a step to `attach`: a context manager, entered anew at every step."""

    def __init__(
        self, views: Mapping[str, View], read: Callable[[str, View, list[Rollout]], list[Reading]], budget: int,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.views, self.read, self.budget, self.precision = views, read, budget, precision
        cuda = bool(views) and device is not None and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None  # one for the run: memory is cached by stream
        self._jobs: list[_Job] = []

    def __enter__(self) -> "Ahead":
        self._pool = ThreadPoolExecutor(1, "score-ahead")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # a pass that has begun ends first: it must not outlive the step
        self._jobs.clear()

    def take(self, source: str, wave: Mapping[int, Rollout]) -> None:
        """Have a finished wave of a source read: its rollouts by their numbers. Raises what an earlier pass raised."""
        for job in self._jobs:
            if job.found.done():
                job.found.result()
        numbers, rollouts = list(wave), list(wave.values())
        for name, view in self.views.items():
            for lm, at, seen in self.read(name, view, rollouts):
                ready = None if self.stream is None else torch.cuda.current_stream(lm.device).record_event()
                found = self._pool.submit(self._states, lm, seen, ready)
                self._jobs.append(_Job(source, name, [numbers[i] for i in at], found))

    def attach(self, source: str, rollouts: list[Rollout]) -> list[Rollout]:
        """A source's rollouts, all of them and in their order, with the states of the views that were read ahead."""
        states = [dict(r.states) for r in rollouts]
        for job in self._jobs:
            if job.source == source:
                for number, found in zip(job.numbers, self._received(job), strict=True):
                    states[number][job.view] = found
        return [replace(r, states=s) if s else r for r, s in zip(rollouts, states, strict=True)]

    def _received(self, job: _Job) -> States:
        states, done = job.found.result()
        if done is not None:
            here = torch.cuda.current_stream(states[0].device)
            here.wait_event(done)
            for found in states:
                found.record_stream(here)  # or their memory would be given away while this stream still reads it
        return states

    @torch.no_grad()
    def _states(self, lm: LanguageModel, rollouts: list[Rollout], ready: Any) -> tuple[States, Any]:
        """In the second thread: the states that predict each rollout's trained tokens."""
        found: dict[int, Tensor] = {}
        with torch.cuda.stream(self.stream), self.precision():  # a stream of None changes nothing
            torch.set_autocast_cache_enabled(False)  # the casts kept there belong to the other thread's stream
            if self.stream is not None:
                self.stream.wait_event(ready)
            for batch in batches(lm, rollouts, self.budget):
                lengths = [len(rollouts[i].trained_index) for i in batch.index]
                found |= zip(batch.index, batch.states(lm, rollouts).split(lengths), strict=True)
            done = None if self.stream is None else self.stream.record_event()
        return [found[i] for i in range(len(rollouts))], done


def without_states(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts without the states of models that read them before they were scored: nobody needs these later."""
    return [replace(r, states={}) if r.states else r for r in rollouts]


# ---------------------------------------------------------------------------------------------------------------------
# What can be read ahead


def check_ahead(recipe: Recipe, method: Method, prompts: Mapping[str, int], processes: int) -> None:
    """Raise RecipeError where `train.score_ahead` cannot work or would have no effect; `prompts` of each source a step."""
    if not recipe.train.score_ahead:
        return
    if recipe.train.sharding != "none":
        raise RecipeError(f"train.score_ahead runs models in a second thread, and train.sharding = {recipe.train.sharding} "
                          "communicates inside models, which two threads must not do; remove one of them")  # fmt: skip
    if recipe.tools is not None:
        raise RecipeError("train.score_ahead works without tools: with them responses do not end in waves; remove it")
    sampled = [name for name, source in method.rollouts.items() if isinstance(source, OnPolicy)]
    if not method.views or not sampled:
        raise RecipeError(f"train.score_ahead has no effect: method {method.name} has "
                          f"{'no views' if sampled else 'no source that samples from the student'}; remove it")  # fmt: skip
    s = recipe.sampling
    rows = max(-(-prompts[name] // processes) * s.group for name in sampled)
    if rows <= wave_rows(s.max_rows, s.group):
        raise RecipeError(f"train.score_ahead has no effect: a step's {rows} responses are one wave (sampling.max_rows = "
                          f"{s.max_rows}), so none is finished while another is sampled; lower sampling.max_rows to "
                          f"{max(1, rows // 2)} or less, or remove it")  # fmt: skip


def obstacles(
    recipe: Recipe, method: Method, student: LanguageModel, teachers: Mapping[str, LanguageModel]
) -> dict[str, str]:
    """View -> why its models cannot read ahead. RecipeError where that is so of every view and it was asked for."""
    sources = method.rollouts.values()
    along = {s.stop_early.view for s in sources if isinstance(s, OnPolicy) and s.stop_early is not None}
    samplers = [student, *(teachers[s.mixed_with] for s in sources if isinstance(s, OnPolicy) and s.mixed_with)]
    samplers += [teachers[s.teacher] for s in sources if isinstance(s, TeacherSamples)]
    switches = any(t.model is student.model and t.adapters is not student.adapters for t in teachers.values())
    found = {}
    for name, view in method.views.items():
        readers = [teachers[reader] for reader in view.models]
        shared = [lm for lm in readers if any(lm.model is other.model for other in samplers)]
        if name in along:
            found[name] = "its model reads along while the student samples (early stop)"
        elif view.context != "own" and view.context.needs():
            found[name] = f"its context reads {', '.join(view.context.needs())}, known once all responses are judged"
        elif switches and any(lm.model is student.model for lm in readers):
            found[name] = "its model is the student's modules, whose adapters are switched while one thread uses them"
        elif any("dynamic" in (text := str(lm.config.to_dict().get("rope_parameters"))) or "longrope" in text
                 for lm in shared):  # fmt: skip
            found[name] = "its model also samples, and its rotary angles change with the length of what is read"
    if recipe.train.score_ahead and len(found) == len(method.views):
        name, why = next(iter(found.items()))
        raise RecipeError(f"train.score_ahead has no effect: view '{name}': {why}; remove it")
    return found
