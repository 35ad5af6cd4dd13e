"""What a teacher reads: its own template, its limits, and how the difference is shown."""

import pytest
from test_turns import LLAMA, PHI, QWEN, make_lm, prompt, said, user

from opdkit.config import ModelConfig, TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks import contexts
from opdkit.tasks.contexts import check_context, describe_difference, reread
from opdkit.tasks.problem import Problem
from opdkit.tasks.prompts import encode_prompt

TASK = TaskConfig(kind="file", system="s", template_args={"enable_thinking": False})
STUDENT = make_lm(QWEN)
P, Q = Problem("p", "hi"), Problem("q", (user("a"), said("b"), user("c")), system="own")


def lm(template, name="big", **settings):
    made = make_lm(template, **settings)
    made.name = name
    return made


def own(**args):
    return ModelConfig(path="x", template="own", template_args=args)


def sampled(problem, *responses):
    ids = encode_prompt(STUDENT.tokenizer, problem, "chat", TASK.system, TASK.template_args)
    return [Rollout(problem, ids, response, "", 0, "stop", trained=(True,) * len(response)) for response in responses]


def test_the_teacher_reads_its_own_prompt_and_scores_the_same_response():
    teacher, given = lm(PHI), [*sampled(P, (7, 8), (9,)), *sampled(Q, (7,))]
    found = reread(teacher, "own", {}, given, TASK)
    assert [prompt(teacher, r) for r in found] == [
        *["<|start|>system\ns<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"] * 2,
        "<|start|>system\nown<|end|>\n<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n"
        "<|start|>user\nc<|end|>\n<|start|>assistant\n",
    ]
    for before, after in zip(given, found, strict=True):
        assert (after.response_ids, after.trained, after.group, after.problem) == (
            before.response_ids, before.trained, before.group, before.problem)  # fmt: skip
        assert before.prompt_ids != after.prompt_ids


def test_the_teachers_template_arguments_are_its_own():
    ends = [
        prompt(STUDENT, reread(lm(QWEN), "own", args, sampled(P, (7,)), TASK)[0]).rpartition("assistant")[2]
        for args in ({}, {"enable_thinking": False})
    ]
    assert ends == ["\n", "\n<think>\n\n</think>\n\n"]


def test_template_student_changes_nothing_and_a_prompt_is_rendered_once_for_its_group(monkeypatch):
    given = [*sampled(P, (7,), (8,), (9,)), *sampled(Q, (7,), (8,))]
    assert reread(lm(PHI), "student", {}, given, TASK) == given
    rendered = []

    def counted(tokenizer, problem, *rest):
        rendered.append(problem.id)
        return encode_prompt(tokenizer, problem, *rest)

    monkeypatch.setattr(contexts, "encode_prompt", counted)
    reread(lm(PHI), "own", {}, given, TASK)
    assert rendered == ["p", "q"]


def test_limits_of_the_teachers_prompt():
    length = len(reread(lm(PHI), "own", {}, sampled(P, (7,)), TASK)[0].prompt_ids)
    assert len(reread(lm(PHI, context=length + 2), "own", {}, sampled(P, (7, 8)), TASK)) == 1
    with pytest.raises(DataError, match=rf"problem p: teacher 'big' reads {length} .*context of {length + 1}; lower "
                                        r"sampling.max_new_tokens to 1, or set teachers.big.template: student"):  # fmt: skip
        reread(lm(PHI, context=length + 1), "own", {}, sampled(P, (7, 8)), TASK)
    task = TASK.model_copy(update={"max_prompt_tokens": length - 1})
    for check in (
        lambda: reread(lm(PHI), "own", {}, sampled(P, (7,)), task),
        lambda: check_context(lm(PHI), own(), [P], task),
    ):
        with pytest.raises(DataError, match=rf"problem p has {length} tokens as teacher 'big' reads it.* {length - 1}"):
            check()


def test_settings_without_effect():
    plain = TaskConfig(kind="file", template="plain")
    check_context(lm(PHI), ModelConfig(path="x"), [P], plain)
    check_context(lm(QWEN), own(enable_thinking=True), [P, Q], TASK)  # the default, spelled out
    for config, task, message in (
        (own(), plain, r"teachers.big.template 'own' has no effect with task.template 'plain'"),
        (
            ModelConfig(path="x", template_args={"a": 1}),
            TASK,
            r"big.template_args = .* no effect with template 'student'",
        ),
        (own(thinking=True), TASK, r"teachers.big.template_args.thinking = True has no effect"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_context(lm(QWEN), config, [P], task)
    with pytest.raises(RecipeError, match=r"teachers.big.template 'own' has no effect"):
        reread(lm(QWEN), "own", {}, sampled(P, (7,)), plain)


def test_the_difference_is_shown():
    teachers = {
        "same": lm(QWEN, "same"),
        "open": lm(QWEN, "open"),
        "other": lm(LLAMA, "other", eos=("<|stop|>", "<|end|>")),
        "base": lm(PHI, "base", eos=("<|stop|>",)),
    }
    configs = {"same": own(enable_thinking=False), "open": own(), "other": own(), "base": ModelConfig(path="x")}
    shown = describe_difference(STUDENT, teachers, configs, P, TASK)
    *rest, stops = shown.split("\n")
    assert rest == [
        "teacher 'same' reads the same prompt through its own template",
        "teacher 'open' reads another prompt (32 tokens, student 36), problem p:",
        "--- student",
        "+++ open",
        "@@ -5,6 +5,2 @@",
        " <|start|>assistant",
        "-<think>",
        " ",
        "-</think>",
        "-",
        "-",
        "teacher 'other' reads another prompt (30 tokens, student 36), problem p:",
        "--- student",
        "+++ other",
        "@@ -1,9 +1,6 @@",
        " <|start|>system",
        "-s<|end|>",
        "-<|start|>user",
        "-hi<|end|>",
        "-<|start|>assistant",
        "-<think>",
        " ",
        "-</think>",
        "+s<|end|><|start|>user",
        "+",
        "+hi<|end|><|start|>assistant",
        " ",
        "teacher 'other' ends a response with '<|stop|>' (2), '<|end|>' (1), the student with '<|end|>' (1); '<|end|>' (1) "
        "ends both",
        "teacher 'base' reads the student's prompt",
    ]
    assert stops.startswith("teacher 'base' ends a response with '<|stop|>' (2), the student with '<|end|>' (1): ")
    assert stops.endswith("set sampling.eos_ids: [2], or use a teacher with the student's chat format")
    assert "ends a response" not in describe_difference(STUDENT, {"base": teachers["base"]}, configs, P, TASK, [2])
