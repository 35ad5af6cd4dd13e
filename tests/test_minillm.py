"""MiniLLM: the exact gradient of the KL between whole responses, by enumeration, and what its approximations cost."""

import pytest
import torch
from synthetic import logits
from tree import RESPONSES, expected_tree_gradient, gradient_of, log_probs, mixture, response_kl, tree_step, whole

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig
from opdkit.divergences import log_mixture
from opdkit.errors import RecipeError
from opdkit.losses import ClippedPolicyGradient
from opdkit.models import load_model
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.sampler import Keep, Sampling, prompt_keys
from opdkit.rollouts.sources import Request, Supply
from opdkit.signals import discounted, log_ratio
from opdkit.sources import OnPolicy
from opdkit.step import Layout, Scores, Step
from opdkit.support import Full
from opdkit.tasks.problem import Problem, Task
from opdkit.views.local import score
from opdkit.weights import importance

P, Q = logits(7, 3, seed=1), logits(7, 3, seed=2)
EXACT = gradient_of(lambda table: response_kl(table, Q), P)


def error(method, sampler) -> float:
    return float((expected_tree_gradient(method, P, Q, sampler) - EXACT).abs().max())


def test_the_toy_is_a_distribution():
    assert len(RESPONSES) == 15
    assert whole(log_probs(P)).exp().sum().item() == pytest.approx(1.0, abs=1e-14)


def test_without_mixing_and_normalisation_the_gradient_is_exact():
    """Single step plus future = policy gradient of the response's whole log ratio, for every length of response."""
    assert error(build_method("minillm", {"mix": 0.0, "length_norm": False}), P) < 1e-12
    assert (
        error(build_method("opd", {"discount": 1.0}), P) < 1e-12
    )  # the same without the closed form for the token itself
    assert error(build_method("opd", {}), P) > 1e-2  # token-level OPD leaves the future out
    assert error(build_method("full_opd", {}), P) > 1e-2


@pytest.mark.parametrize("mix", [0.2, 0.6])
def test_with_the_whole_product_as_weight_it_is_exact_under_any_mixture(mix):
    sampler = mixture(P, Q, mix)
    whole_product = {"mix": mix, "length_norm": False, "level": "sequence"}
    assert error(build_method("minillm", whole_product), sampler) < 1e-12
    assert error(build_method("minillm", whole_product | {"importance_cap": 1.1}), sampler) > 1e-3
    assert (
        error(build_method("minillm", {"mix": mix, "length_norm": False}), sampler) > 1e-3
    )  # the paper's token weight
    assert error(build_method("minillm", {"mix": 0.0, "length_norm": False}), sampler) > 1e-3  # none


def test_the_token_weight_is_exact_for_responses_of_one_token():
    """Only the prefix and the future are left uncorrected: at the first prefix, of responses that end there, it is right."""
    short = torch.cat([torch.tensor([[60.0, 0.0, 0.0]]).double(), P[1:]])  # token 0 ends every response
    teacher = torch.cat([torch.tensor([[60.0, 1.0, -1.0]]).double(), Q[1:]])
    method = build_method("minillm", {"mix": 0.4})
    found = expected_tree_gradient(method, short, teacher, mixture(short, teacher, 0.4))
    assert (found - gradient_of(lambda table: response_kl(table, teacher), short)).abs().max() < 1e-14


def test_length_normalisation_is_another_objective():
    assert error(build_method("minillm", {"mix": 0.0}), P) > 1e-3


def test_the_normalised_future_by_hand():
    """Rewards (1, 2, 4 | 3 | 5, -1): the mean of what follows; nothing follows the last token, whatever the padding."""
    seq = torch.tensor([0, 0, 0, 1, 2, 2])
    reward = torch.tensor([1.0, 2.0, 4.0, 3.0, 5.0, -1.0])
    views = {"student": Scores(torch.zeros(6)), "teacher": Scores(reward)}
    step = Step(Layout(seq, seq, torch.tensor([0, 1, 2])), seq, views)
    method = build_method("minillm", {})
    assert method.terms[1].signal(step).tolist() == [3.0, 4.0, 0.0, 0.0, -1.0, 0.0]
    plain = build_method("minillm", {"length_norm": False})
    assert plain.terms[1].signal(step).tolist() == [6.0, 4.0, 0.0, 0.0, -1.0, 0.0]
    assert plain.terms[1].signal == discounted(of=log_ratio(), gamma=1.0, future_only=True)


def test_the_weight_by_hand():
    method = build_method("minillm", {"mix": 0.25})
    step = tree_step(method, P, Q, mixture(P, Q, 0.25))
    p, q = log_probs(P).exp(), log_probs(Q).exp()
    expected = p / (0.25 * q + 0.75 * p)
    assert (method.terms[0].weight(step) - expected).abs().max() < 1e-14
    assert expected.max() <= 1 / 0.75
    assert method.terms[0].weight == method.terms[1].weight == importance(cap=None)


def test_sampling_records_what_the_weight_needs(student_path, teacher_path):
    """From rollouts to weights with real models: p / (mix q + (1 - mix) p) of every sampled token."""
    lm = load_model(ModelConfig(path=student_path), "student")
    teacher = load_model(ModelConfig(path=teacher_path), "teacher")
    method = build_method("minillm", {"mix": 0.3})
    problems = [Problem(str(i), "p", answer="x") for i in range(3)]
    prompts = [(p, (4, 5 + i)) for i, p in enumerate(problems)]
    supply = Supply(lm, {"teacher": teacher}, Task("t", problems, []), Sampling(2, 6), Keep(), 0)
    request = Request(method.rollouts["policy"], prompts, prompt_keys([ids for _, ids in prompts], 1))
    rollouts = supply.roll_out({"policy": request}, 0)["policy"]
    step = flatten(rollouts, horizon=6)
    scored = score(teacher, rollouts, step, Full(), budget=512)
    p = step.views["student"].sampled
    expected = (p - log_mixture(p, scored.sampled, 0.3)).exp()
    assert expected.min() < 0.9 and (method.terms[0].weight(step) - expected).abs().max() < 1e-4


def test_composition_and_arguments():
    method = build_method("minillm", {})
    assert method.rollouts == {"policy": OnPolicy(mixed_with="teacher", mix=0.2)} and method.models == ("teacher",)
    assert method.terms[1].loss == ClippedPolicyGradient(0.2, 0.2)
    assert build_method("minillm", {"mix": 0.0}).rollouts == {"policy": OnPolicy()}
    assert build_method("minillm", {"teacher": "big"}).rollouts["policy"].mixed_with == "big"
    for arguments, message in [
        ({"mix": 0.0, "importance_cap": 2.0}, "level and importance_cap have no effect with mix = 0"),
        ({"mix": 0.0, "level": "sequence"}, "level and importance_cap have no effect with mix = 0"),
        ({"mix": 1.0}, "mix=1.0.*strictly between 0 and 1"),
    ]:
        with pytest.raises(RecipeError, match=f"method minillm: .*{message}"):
            build_method("minillm", arguments)
