"""Sequence-level distillation: what its gradient is an estimate of, and a step from responses to a loss."""

import pytest
from synthetic import logits
from tree import expected_tree_gradient, gradient_of, log_probs, response_kl, whole

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig
from opdkit.errors import RecipeError
from opdkit.losses import CrossEntropy
from opdkit.models import load_model
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.sampler import Keep, Sampling, prompt_keys
from opdkit.rollouts.sources import Request, Supply
from opdkit.sources import TeacherSamples
from opdkit.tasks.problem import Problem, Task

P, Q = logits(7, 3, seed=1), logits(7, 3, seed=2)


def test_on_teacher_samples_the_gradient_is_that_of_the_forward_kl_between_responses():
    method = build_method("seqkd", {})
    found = expected_tree_gradient(method, P, Q, sampler=Q)
    exact = gradient_of(lambda table: -(whole(log_probs(Q)).exp() * whole(log_probs(table))).sum(), P)
    assert (found - exact).abs().max() < 1e-13
    assert expected_tree_gradient(method, Q, Q, sampler=Q).abs().max() < 1e-14  # in the mean, not for each response
    assert (found - gradient_of(lambda table: response_kl(table, Q), P)).abs().max() > 1e-2


def test_composition_and_arguments():
    method = build_method("seqkd", {"teacher": "big", "temperature": 0.0})
    assert method.rollouts == {"data": TeacherSamples(teacher="big", temperature=0.0)} and method.models == ("big",)
    assert method.terms[0].loss == CrossEntropy() and not method.views and not method.needs_reward
    with pytest.raises(RecipeError, match=r"method seqkd: temperature = -1.0: expected 0 \(greedy\) or more"):
        build_method("seqkd", {"temperature": -1.0})


def test_a_step_holds_the_teachers_tokens(student_path, teacher_path, monkeypatch, tmp_path):
    monkeypatch.setenv("OPDKIT_CACHE", str(tmp_path))
    lm = load_model(ModelConfig(path=student_path), "student")
    teacher = load_model(ModelConfig(path=teacher_path), "teacher")
    problems = [Problem(str(i), "p", answer="x") for i in range(3)]
    prompts = [(p, (4, 5 + i)) for i, p in enumerate(problems)]
    supply = Supply(lm, {"teacher": teacher}, Task("t", problems, []), Sampling(1, 6), Keep(), 0)
    source = build_method("seqkd", {}).rollouts["data"]
    request = Request(source, prompts, prompt_keys([ids for _, ids in prompts], 1))
    rollouts = supply.roll_out({"data": request}, 0)["data"]
    step = flatten(rollouts)
    assert step.tokens.tolist() == [i for r in rollouts for i in r.response_ids] and not step.views
    assert [supply.stores[source].get(ids).ids for _, ids in prompts] == [r.response_ids for r in rollouts]
