"""A teacher for each domain: who scores what, one set of scores from several models, and what is left out and counted."""

import json

import pytest
import torch
from conftest import make_model
from test_loop import changed, metrics, run, same, weights

from opdkit.config import ModelConfig, parse_recipe
from opdkit.errors import DataError, MethodError, RecipeError
from opdkit.losses import Divergence, SupportPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.models import load_model
from opdkit.plan import plan
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import Keep, Sampling
from opdkit.rollouts.sources import on_policy
from opdkit.signals import log_ratio, support_gap
from opdkit.step import take_rows
from opdkit.support import Full, Sampled, TopK
from opdkit.tasks.problem import Problem, Verdict
from opdkit.train import loop
from opdkit.train.setup import set_up
from opdkit.train.update import streams
from opdkit.views.batches import flat_index
from opdkit.views.local import score
from opdkit.views.route import assign, merge

SUPPORTS = [Sampled(), TopK(4), TopK(4, "union"), Full()]


@pytest.fixture(scope="module")
def other_path(tmp_path_factory) -> str:
    """A second teacher with another width, so that the two heads cannot be taken for one."""
    return make_model(tmp_path_factory.mktemp("other"), seed=3, layers=1)


@pytest.fixture(scope="module")
def teachers(teacher_path, other_path):
    return {name: load_model(ModelConfig(path=path), name) for name, path in (("a", teacher_path), ("b", other_path))}


@pytest.fixture
def two_domains(recipe_data, teacher_path, other_path, tmp_path) -> dict:
    """Sums of even and odd first terms are two domains with a teacher each."""
    path = tmp_path / "domains.jsonl"
    rows = [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b), "domain": ("even", "odd")[a % 2]}
            for a in range(8) for b in range(8)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    routed = {"even": "a", "odd": "b"}
    return changed(recipe_data, task__path=str(path), method={"name": "uni_opd", "teacher": routed},
                   teachers={"a": {"path": teacher_path}, "b": {"path": other_path}}, sampling__group=4)  # fmt: skip


def sampled_in(lm, domains: str) -> list[Rollout]:
    prompts = [(Problem(str(i), f"{i}+1=", domain=d), (i + 4, 12, 5)) for i, d in enumerate(domains)]
    how = Sampling(2, 6, 1.0, 1.0, 0, (), lm.eos_ids, 64)
    return on_policy(lm, prompts, how, 7, Keep(8, hidden=True))


def routed(lm, teachers, rollouts, support, model):
    flat = flatten(rollouts, head=lm.head())
    parts = [(flat_index(flat, at), score(teachers[name], [rollouts[s] for s in at], flat, support, budget=40, top_k=4, at=at))
             for name, at in assign(model, rollouts, "teacher").items()]  # fmt: skip
    return flat, merge(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of several teachers on one axis


@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_every_token_has_the_scores_of_its_domains_teacher(lm, teachers, support):
    rollouts = sampled_in(lm, "xyxxy")
    flat, joined = routed(lm, teachers, rollouts, support, {"x": "a", "y": "b"})
    mine = torch.tensor([r.problem.domain == "x" for r in rollouts])[flat.layout.seq]
    for name, index in (("a", torch.nonzero(mine).squeeze(1)), ("b", torch.nonzero(~mine).squeeze(1))):
        alone = score(teachers[name], rollouts, flat, support, budget=40, top_k=4)
        for field in ("sampled", "entropy", "top_ids", "top"):
            found, expected = getattr(joined, field)[index], getattr(alone, field)[index]
            assert torch.allclose(found.double(), expected.double(), atol=2e-6), field
        if alone.candidates is not None:
            found, expected = take_rows(joined.candidates, index), take_rows(alone.candidates, index)
            assert torch.equal(found.ids, expected.ids) and torch.equal(found.valid, expected.valid)
            assert torch.allclose(found.teacher, expected.teacher, atol=1e-5)
            assert torch.allclose(found.teacher_tail, expected.teacher_tail, atol=1e-5)
        if alone.full is not None:
            whole = alone.full.log_probs(index)
            assert torch.allclose(joined.full.log_probs(index), whole, atol=1e-5)
            assert torch.allclose(joined.full.take(index).log_probs(slice(0, 3)), whole[:3], atol=1e-5)
    if joined.full is not None:
        assert joined.full.log_probs(slice(0, 0)).shape[0] == 0


@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_one_teacher_for_all_domains_is_the_plain_view(lm, teachers, support):
    rollouts = sampled_in(lm, "xyx")
    flat, joined = routed(lm, teachers, rollouts, support, {"x": "a", "*": "a"})
    alone = score(teachers["a"], rollouts, flat, support, budget=40, top_k=4)
    assert torch.equal(joined.sampled, alone.sampled) and torch.equal(joined.top_ids, alone.top_ids)


def by(support) -> Term:
    if isinstance(support, Full):
        return Term(loss=Divergence("jsd"))
    return (
        Term(signal=log_ratio())
        if isinstance(support, Sampled)
        else Term(loss=SupportPolicyGradient(), signal=support_gap())
    )


@pytest.mark.parametrize("support", [Sampled(), TopK(4), Full()], ids=repr)
def test_moving_teacher_b_leaves_gradients_of_domain_a_alone(lm, teachers, support, monkeypatch):
    """Through the code that trains: signals, coefficients, the head's backward pass."""
    from dataclasses import replace

    from opdkit.head import HeadRows, objective
    from opdkit.train.processes import Processes
    from opdkit.train.update import coefficients, row_terms

    rollouts = sampled_in(lm, "xyxxy")
    method = Method(name="m", views={"teacher": View({"x": "a", "y": "b"}, support)}, terms=(by(support),))

    def gradient() -> torch.Tensor:
        flat, joined = routed(lm, teachers, rollouts, support, {"x": "a", "y": "b"})
        steps = {"policy": replace(flat, views={**flat.views, "teacher": joined})}
        found = streams(method, steps)
        part = {"policy": range(len(rollouts))}
        coefs = coefficients(found, steps, part, Processes(0, 1, torch.device("cpu")))
        assert isinstance(flat.views["student"].full, HeadRows)
        leaf = flat.views["student"].full.hidden.clone().requires_grad_(True)
        loss, _ = objective(leaf, lm.head(), row_terms(found["policy"], coefs["policy"], steps["policy"]), 3)
        return torch.autograd.grad(loss, leaf)[0]

    before = gradient()
    monkeypatch.setattr(teachers["b"], "temperature", 3.0)
    after = gradient()
    of_x = torch.tensor([r.problem.domain == "x" for r in rollouts])[flatten(rollouts).layout.seq]
    assert torch.equal(before[of_x], after[of_x])
    assert (before[~of_x] - after[~of_x]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# In a recipe


def test_a_run_with_two_domains_logs_each_of_them(two_domains):
    path = run(two_domains, train__steps=2)
    row = metrics(path)[0]
    assert {"accuracy/even", "accuracy/odd", "reverse_kl/even", "reverse_kl/odd", "margin/below", "margin/inverted",
            "count/dropped_rollouts"} <= row.keys()  # fmt: skip
    first = metrics(path, "evals.jsonl")[0]
    assert {"accuracy/even", "accuracy_se/odd"} <= first.keys()


def test_the_domains_of_a_step_have_the_numbers_of_the_data_set(two_domains):
    setup = set_up(parse_recipe(two_domains))
    assert sorted(setup.domains) == ["even", "odd"]
    rollouts = sampled_in(setup.student, ["odd", "even", "odd"])
    step = loop.make_step(setup, "policy", rollouts, 1, {})
    assert [setup.domains[i] for i in step.domain.tolist()] == [r.problem.domain for r in rollouts]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"even": "a", "off": "b"}, r"no teacher for domain 'odd' \(problem .*\); it has even: a, off: b: name one"),
        ({"even": "a", "odd": "c"}, "asks for teacher 'c'"),
        ({"even": "a", "odd": "a"}, "teacher 'b' is not used"),
        (
            {"even": "a", "odd": "b", "off": "a"},
            "names a teacher for domain 'off', but the training problems have even, odd",
        ),
        ({"even": "a", "odd": "b", "*": "a"}, r"names a teacher for domain '\*'"),
    ],
)
def test_mappings_that_do_not_fit_stop_at_the_start(two_domains, teacher, said):
    with pytest.raises(RecipeError, match=said):
        run(two_domains, method={"name": "uni_opd", "teacher": teacher})


def test_a_domain_that_comes_up_later_stops_the_run_there(two_domains):
    setup = set_up(parse_recipe(two_domains))
    with pytest.raises(DataError, match="no teacher for domain 'new'"):
        loop.make_step(setup, "policy", sampled_in(setup.student, ["even", "new"]), 1, {})


def test_a_view_without_a_model_is_refused():
    with pytest.raises(MethodError, match="names no teacher"):
        View({})


def test_killed_in_the_middle_it_goes_on_as_if_uninterrupted(two_domains, tmp_path):
    whole = run(two_domains, train__steps=4, output=str(tmp_path / "whole"))
    part = run(two_domains, train__steps=2, output=str(tmp_path / "part"))
    run(two_domains, train__steps=4, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))
    assert [r["count/dropped_rollouts"] for r in metrics(whole)] == [r["count/dropped_rollouts"] for r in metrics(part)]


def test_a_batch_from_which_everything_is_dropped_moves_nothing(two_domains, monkeypatch):
    """Only-correct training of a student that gets nothing right: steps are scored and logged, weights stay."""
    monkeypatch.setattr("opdkit.rewards.answers.verify_exact", lambda problem, text: Verdict(0.0, False))
    data = changed(two_domains, train__steps=2, optim__weight_decay=0.5, eval__kl_prompts=0)
    data["method"]["balance"] = float("inf")
    path = run(data)
    assert [(r["loss"], r["grad_norm"], r["count/dropped_rollouts"], r["accuracy"]) for r in metrics(path)] == [
        (0, 0, 16, 0)
    ] * 2
    before = load_model(ModelConfig(path=two_domains["student"]["path"]), "student").model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in weights(path).items())


def test_a_plan_counts_every_teacher(two_domains):
    one = changed(two_domains, method={"name": "uni_opd", "teacher": "a"})
    del one["teachers"]["b"]
    routed, plain = (plan(parse_recipe(data), "H100-80GB") for data in (two_domains, one))
    names = [{part.what for part in found.phases[0].resident} for found in (routed, plain)]
    assert "b weights" in names[0] and "b weights" not in names[1] and "a weights" in names[1]
