"""What a teacher reads before the response: the student's prompt, the same problem through its own chat template, or a
problem that a context (`opdkit.contexts`) has rewritten, through either template.

Left out: images.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from opdkit.config import ModelConfig, TaskConfig
from opdkit.contexts import Context, Material
from opdkit.errors import DataError, RecipeError
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import PROBE, Problem
from opdkit.tasks.prompts import check_template, encode_prompt

Template = Literal["student", "own"]


def reread(
    lm: LanguageModel,
    template: Template,
    template_args: Mapping[str, Any],
    rollouts: Sequence[Rollout],
    task: TaskConfig,
    told: Sequence[Problem | None] | None = None,
    tokenizer: Any = None,
) -> list[Rollout]:
    """The same rollouts with the prompt as teacher `lm` reads it; the response's ids do not change.

    `student` is the prompt that the student read. `told` is what a context has made of each rollout's problem, None where
    it has nothing to show; `tokenizer` is then the student's. Raises DataError for a prompt that is over
    task.max_prompt_tokens (which does not count what a context adds) or leaves no room in the teacher's context,
    RecipeError where the task has no chat template.
    """
    if template == "student" and told is None:
        return list(rollouts)
    if template == "own":
        _refuse_plain(lm.name, task)
    made: dict[tuple[int, Any], tuple[int, ...]] = {}  # the responses of a group share their problem
    found = []
    for rollout, more in zip(rollouts, told or [None] * len(rollouts), strict=True):
        if more is None and template == "student":
            found.append(rollout)
            continue
        key = (id(rollout.problem), None if more is None else _text_key(more))
        if key not in made:
            if more is None:
                made[key] = _own_prompt(lm, template_args, rollout.problem, task)
            elif template == "own":
                made[key] = encode_prompt(lm.tokenizer, more, "chat", task.system, template_args)
            else:
                made[key] = encode_prompt(tokenizer, more, task.template, task.system, task.template_args)
        prompt = made[key]
        if len(prompt) + len(rollout.response_ids) > lm.context_length:
            raise _too_long(lm, rollout, len(prompt), more is not None)
        found.append(replace(rollout, prompt_ids=prompt))
    return found


def read_by_student(
    lm: LanguageModel, context: Context, rollouts: Sequence[Rollout], task: TaskConfig, material: Material
) -> list[Rollout]:
    """Rollouts that the student did not sample, with what a context shows in place of the student's prompt.

    Those for which there is nothing to show keep their prompt. Raises DataError for a response of several turns, whose later
    prompts hold the earlier ones, and as `reread` does.
    """
    for rollout in rollouts:
        if isinstance(rollout.problem.response, tuple):
            raise DataError(
                f"the response of problem {rollout.problem.id} is a conversation; a rollout source with a context needs one "
                "answer to one prompt: take the rows with a text, or leave out the context"
            )
    told = context.rewrite(rollouts, material)
    return reread(lm, "student", {}, rollouts, task, told, material.tokenizer)


def _text_key(problem: Problem) -> str:
    return problem.prompt if isinstance(problem.prompt, str) else str(problem.prompt[-1])


def _too_long(lm: LanguageModel, rollout: Rollout, prompt: int, told: bool) -> DataError:
    room = lm.context_length - prompt
    way_out = f"lower sampling.max_new_tokens to {room}, or set teachers.{lm.name}.template: student"
    if told:
        way_out = "set the method's max_tokens, which cuts the text that is shown, or lower sampling.max_new_tokens"
    who = "the student" if lm.name == "student" else f"teacher '{lm.name}'"
    return DataError(
        f"problem {rollout.problem.id}: {who} reads {prompt} prompt tokens"
        f"{' with its context' if told else ''}, and with {len(rollout.response_ids)} response tokens that is over its "
        f"context of {lm.context_length}; {way_out}"
    )


def check_told(
    lm: LanguageModel, config: ModelConfig, context: Context, problems: Sequence[Problem], task: TaskConfig,
    material: Material, max_new_tokens: int,
) -> None:  # fmt: skip
    """Raise an OpdkitError where the task cannot give what a context shows, or the prompt leaves no room for a response.

    Prompts are made for the first 16 problems, with what is known before there are rollouts.
    """
    context.check(problems, material)
    longest = (0,) * max_new_tokens
    empty = [Rollout(problem, (), longest, "", group, "length") for group, problem in enumerate(problems[:PROBE])]
    told = context.rewrite(empty, material)
    reread(lm, config.template, config.template_args, empty, task, told, material.tokenizer)


def check_context(lm: LanguageModel, config: ModelConfig, problems: Sequence[Problem], task: TaskConfig) -> None:
    """Raise RecipeError for a teacher's template settings without effect, DataError for prompts that it cannot read.

    Looks at the first 16 problems.
    """
    if config.template == "student":
        if config.template_args:
            raise RecipeError(
                f"teachers.{lm.name}.template_args = {config.template_args} has no effect with template 'student'; set "
                f"teachers.{lm.name}.template: own, or remove it"
            )
        return
    _refuse_plain(lm.name, task)
    probe = problems[:PROBE]
    check_template(lm.tokenizer, probe, task.system, config.template_args, f"teachers.{lm.name}.template_args")
    for problem in probe:
        _own_prompt(lm, config.template_args, problem, task)


def describe_difference(
    student: LanguageModel,
    teachers: Mapping[str, LanguageModel],
    configs: Mapping[str, ModelConfig],
    problem: Problem,
    task: TaskConfig,
    eos_ids: Sequence[int] | None = None,
    *,
    same: bool = True,
) -> str:
    """What every teacher reads before the response, as a diff of its prompt against the student's, and other end tokens.

    `teachers` and `configs` have the same names; `eos_ids` are the recipe's, where it sets them. Special tokens are shown.
    Unless `same`, teachers that read the student's own prompt are passed over.
    """
    lines = []
    ours = encode_prompt(student.tokenizer, problem, task.template, task.system, task.template_args)
    ends = student.eos_ids if eos_ids is None else tuple(eos_ids)
    for name, teacher in teachers.items():
        config = configs[name]
        if config.template == "student":
            lines += [f"teacher '{name}' reads the student's prompt"] if same else []
        else:
            theirs = _own_prompt(teacher, config.template_args, problem, task)
            lines += _diff(name, problem, student, ours, teacher, theirs)
        if set(teacher.eos_ids) != set(ends):
            lines.append(_other_ends(name, teacher, student, ends))
    return "\n".join(lines)


def _own_prompt(
    lm: LanguageModel, template_args: Mapping[str, Any], problem: Problem, task: TaskConfig
) -> tuple[int, ...]:
    ids = encode_prompt(lm.tokenizer, problem, "chat", task.system, template_args)
    if len(ids) > task.max_prompt_tokens:
        raise DataError(
            f"prompt of problem {problem.id} has {len(ids)} tokens as teacher '{lm.name}' reads it, task.max_prompt_tokens is "
            f"{task.max_prompt_tokens}; raise it, or set teachers.{lm.name}.template: student"
        )
    return ids


def _refuse_plain(name: str, task: TaskConfig) -> None:
    if task.template == "plain":
        raise RecipeError(
            f"teachers.{name}.template 'own' has no effect with task.template 'plain': there is no chat template to apply; "
            "set task.template: chat, or remove it"
        )


def _diff(
    name: str,
    problem: Problem,
    student: LanguageModel,
    ours: tuple[int, ...],
    teacher: LanguageModel,
    theirs: tuple[int, ...],
) -> list[str]:
    if ours == theirs:
        return [f"teacher '{name}' reads the same prompt through its own template"]
    before = student.tokenizer.decode(list(ours)).split("\n")
    after = teacher.tokenizer.decode(list(theirs)).split("\n")
    diff = difflib.unified_diff(before, after, "student", name, lineterm="", n=1)
    return [
        f"teacher '{name}' reads another prompt ({len(theirs)} tokens, student {len(ours)}), problem {problem.id}:",
        *diff,
    ]


def _other_ends(name: str, teacher: LanguageModel, student: LanguageModel, ends: Sequence[int]) -> str:
    theirs, ours = _tokens(teacher, teacher.eos_ids), _tokens(student, ends)
    said = f"teacher '{name}' ends a response with {theirs}, the student with {ours}"
    if shared := [i for i in ends if i in teacher.eos_ids]:
        return f"{said}; {_tokens(student, shared)} ends both"
    return (
        f"{said}: the teacher hardly ever writes the student's end token, and distillation teaches the student not to stop; "
        f"set sampling.eos_ids: {list(teacher.eos_ids)}, or use a teacher with the student's chat format"
    )


def _tokens(lm: LanguageModel, ids: Sequence[int]) -> str:
    return ", ".join(f"{lm.tokenizer.decode([i])!r} ({i})" for i in ids)
