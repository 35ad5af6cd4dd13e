"""Where rollouts come from: the student's own samples, a teacher's, the replay buffer, or the data set's responses.

Left out: the buffer itself, which belongs to the run (`rollouts.replay`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from opdkit.method import View
from opdkit.models import LanguageModel
from opdkit.rollouts.early import Watch
from opdkit.rollouts.responses import ResponseStore, open_store, respond
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Mixture, Sample, Sampling, prompt_keys, sample
from opdkit.rollouts.tools import ToolUse
from opdkit.sources import Dataset, OnPolicy, Source, TeacherSamples
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.turns import dataset_rollouts

Prompts = Sequence[tuple[Problem, tuple[int, ...]]]
Read = Callable[[LanguageModel, list[Rollout]], list[Rollout]]  # the rollouts with the prompts that a model reads
Take = Callable[[Mapping[int, Rollout]], None]  # is given the rollouts of a finished wave, by number


def on_policy(
    lm: LanguageModel, prompts: Prompts, how: Sampling, seed: int, keep: Keep | None = None, version: int = 0,
    keys: Sequence[str] | None = None, mixture: Mixture | None = None, watch: Watch | None = None,
    tools: ToolUse | None = None, take: Take | None = None,
) -> list[Rollout]:  # fmt: skip
    """Sampled responses, the group of one prompt side by side; with `tools`, what these answer stands in between.

    `take` is given every wave as soon as it is done (without tools).
    """
    if tools is not None:
        keys = keys or prompt_keys([ids for _, ids in prompts], seed)
        return tools.respond(lm, prompts, how, keys, keep, mixture, version)
    seen = "" if watch is None else watch.rule.view

    def made(group: int, s: Sample) -> Rollout:
        states = {} if s.states is None else {seen: s.states}
        return Rollout(
            *prompts[group], s.ids, s.text, group, s.finish, version=version, capture=s.capture, states=states
        )

    def finished(wave: Mapping[tuple[int, int], Sample]) -> None:
        assert take is not None
        take({i * how.group + j: made(i, s) for (i, j), s in wave.items()})

    asked = [ids for _, ids in prompts]
    groups = sample(lm, asked, how, seed, keep, keys, mixture, watch=watch, finished=finished if take else None)
    return [made(group, s) for group, samples in enumerate(groups) for s in samples]


def from_dataset(lm: LanguageModel, task: Task, prompts: Prompts, how: Sampling) -> list[Rollout]:
    """The data set's response to each prompt, with EOS, cut at the token limit. Raises DataError if there is none.

    A conversation may become several rollouts of one group, one after the other (`tasks.turns`).
    """
    rollouts = []
    for group, (problem, ids) in enumerate(prompts):
        eos = how.eos_ids or lm.eos_ids
        rollouts += dataset_rollouts(lm, task, problem, ids, group, eos, how.max_new_tokens)
    return rollouts


def teacher_samples(supply: "Supply", source: TeacherSamples, prompts: Prompts) -> list[Rollout]:
    """A teacher's kept responses, one per prompt. They end with the student's EOS, whichever the teacher uses."""
    teacher, own = supply.teachers[source.teacher], supply.how.eos_ids or supply.student.eos_ids
    ends = tuple(sorted({*own, *teacher.eos_ids}))
    how = replace(supply.how, group=1, temperature=source.temperature, top_p=1.0, top_k=0, eos_ids=ends)
    if source not in supply.stores:
        supply.stores[source] = open_store(teacher, how, supply.seed)
    asked = supply.prompts_of(teacher, prompts)
    rollouts = []
    for group, response in enumerate(respond(teacher, asked, how, supply.seed, supply.stores[source])):
        problem, prompt_ids = prompts[group]
        foreign = response.finish == "stop" and response.ids[-1] not in own
        ids = (*response.ids[:-1], own[0]) if foreign else response.ids
        rollouts.append(Rollout(problem, prompt_ids, ids, response.text, group, response.finish))
    return rollouts


@dataclass(frozen=True)
class Request:
    """What one step asks of one source: its prompts with their random-number keys.

    `replayed` answers a Replay source: `how.group` rollouts for each prompt; empty = the student samples afresh.
    `limit` is the most tokens of a response that the student samples; None = as in training.
    """

    source: Source
    prompts: Prompts
    keys: Sequence[str]
    replayed: Sequence[Rollout] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Supply:
    """What rollout sources draw on throughout a run."""

    student: LanguageModel
    teachers: Mapping[str, LanguageModel]
    task: Task
    how: Sampling
    keep: Keep
    seed: int  # the run's: a teacher's responses do not depend on the step
    read: Read = lambda lm, rollouts: rollouts
    stores: dict[TeacherSamples, ResponseStore] = field(default_factory=dict)  # opened when first asked for
    views: Mapping[str, View] = field(default_factory=dict)  # the method's: whose models may read along
    top_list: int = 0  # ids of their own top lists that the method compares
    tools: ToolUse | None = None  # that the student calls

    def roll_out(
        self,
        requests: Mapping[str, Request],
        version: int,
        take: Callable[[str, Mapping[int, Rollout]], None] | None = None,
    ) -> dict[str, list[Rollout]]:
        """Rollouts of every source; groups are numbered through, so that no two sources share one.

        `version` counts the optimiser steps that the student has behind it. `take` is given every finished wave of the
        OnPolicy sources: the source's name, and the rollouts by their numbers within it.
        """
        found, offset = {}, 0
        for name, request in requests.items():
            hand = partial(take, name) if take is not None and isinstance(request.source, OnPolicy) else None
            rollouts = self._rollouts(request, version, hand)
            found[name] = [replace(r, source=name, group=r.group + offset) for r in rollouts]
            offset += len(request.prompts) or len(request.replayed) // self.how.group
        return found

    def _rollouts(self, request: Request, version: int, take: Take | None) -> list[Rollout]:
        source, prompts = request.source, request.prompts
        if isinstance(source, Dataset):
            return from_dataset(self.student, self.task, prompts, self.how)
        if isinstance(source, TeacherSamples):
            return teacher_samples(self, source, prompts)
        if request.replayed:
            return [replace(r, group=i // self.how.group) for i, r in enumerate(request.replayed)]
        mixture = None
        if isinstance(source, OnPolicy) and source.mixed_with is not None:
            teacher = self.teachers[source.mixed_with]
            mixture = Mixture(teacher, source.mix, self.prompts_of(teacher, prompts))
        how = self.how if request.limit is None else replace(self.how, max_new_tokens=request.limit)
        watch = self._watch(source, prompts)
        return on_policy(
            self.student, prompts, how, 0, self.keep, version, request.keys, mixture, watch, self.tools, take
        )

    def _watch(self, source: Source, prompts: Prompts) -> Watch | None:
        """The teacher that reads along and may end responses, where the source has one."""
        if not isinstance(source, OnPolicy) or source.stop_early is None:
            return None
        name = self.views[source.stop_early.view].model
        assert isinstance(name, str)  # the method was checked
        teacher = self.teachers[name]
        return Watch(teacher, self.prompts_of(teacher, prompts), source.stop_early, self.top_list)

    def prompts_of(self, lm: LanguageModel, prompts: Prompts) -> list[tuple[int, ...]]:
        """The prompts as a model reads them."""
        empty = [Rollout(problem, ids, (), "", group, "") for group, (problem, ids) in enumerate(prompts)]
        return [r.prompt_ids for r in self.read(lm, empty)]
