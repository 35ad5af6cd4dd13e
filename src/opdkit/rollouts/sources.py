"""Where rollouts come from: the student's own samples, or the data set's responses."""

from collections.abc import Sequence
from dataclasses import replace

from opdkit.errors import DataError
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Sampling, sample
from opdkit.sources import OnPolicy
from opdkit.tasks.problem import Problem, Task

Prompts = Sequence[tuple[Problem, tuple[int, ...]]]


def on_policy(
    lm: LanguageModel, prompts: Prompts, how: Sampling, seed: int, keep: Keep | None = None, version: int = 0,
    keys: Sequence[str] | None = None,
) -> list[Rollout]:  # fmt: skip
    """Sampled responses, the group of one prompt side by side."""
    groups = sample(lm, [ids for _, ids in prompts], how, seed, keep, keys)
    return [
        Rollout(problem, ids, s.ids, s.text, group, s.finish, version=version, capture=s.capture)
        for group, ((problem, ids), samples) in enumerate(zip(prompts, groups, strict=True))
        for s in samples
    ]


def from_dataset(lm: LanguageModel, task: Task, prompts: Prompts, how: Sampling) -> list[Rollout]:
    """The data set's response to each prompt, with EOS, cut at the token limit. Raises DataError if there is none."""
    rollouts = []
    for group, (problem, ids) in enumerate(prompts):
        text = task.target(problem) if task.target is not None else problem.answer
        if not text:
            raise DataError(f"problem {problem.id} has no response to train on; give the data an answer column")
        tokens = (*lm.tokenizer.encode(text, add_special_tokens=False), (how.eos_ids or lm.eos_ids)[0])
        finish = "stop"
        if len(tokens) > how.max_new_tokens:
            finish, tokens = "length", tokens[: how.max_new_tokens]
            text = lm.tokenizer.decode(tokens, skip_special_tokens=True)
        rollouts.append(Rollout(problem, ids, tokens, text, group, finish, source="data"))
    return rollouts


def roll_out(
    sources: dict[str, tuple[object, Prompts, Sequence[str]]],
    lm: LanguageModel,
    task: Task,
    how: Sampling,
    keep: Keep,
    seed: int,
    version: int,
) -> dict[str, list[Rollout]]:
    """Rollouts of every source, given with its prompts and their random-number keys; groups are numbered through."""
    found, offset = {}, 0
    for name, (source, prompts, keys) in sources.items():
        if isinstance(source, OnPolicy):
            rollouts = on_policy(lm, prompts, how, seed, keep, version, keys)
        else:
            rollouts = from_dataset(lm, task, prompts, how)
        found[name] = [replace(r, source=name, group=r.group + offset) for r in rollouts]
        offset += len(prompts)
    return found
