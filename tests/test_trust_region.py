"""The trust region between a teacher and a reference: exact against dense log-softmax, its limits, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from synthetic import identity, logit_gradient, logits, make_step
from test_loop import changed, metrics, run, same
from test_views import by_hand, dense

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig, parse_recipe
from opdkit.errors import MethodError, RecipeError
from opdkit.expressions import read
from opdkit.head import Head
from opdkit.method import Method, Term, View
from opdkit.methods.sdpo import sdpo
from opdkit.models import load_model
from opdkit.plan.plan import plan
from opdkit.rollouts.flatten import flatten
from opdkit.signals import log_ratio
from opdkit.support import Full, Sampled, TopK
from opdkit.train.checkpoint import latest_checkpoint
from opdkit.train.setup import set_up
from opdkit.view import TrustRegion
from opdkit.views.interpolated import InterpolatedHead, model_of
from opdkit.views.local import score, score_batch

V = 11
P, Q, R = (logits(6, V, seed=seed) for seed in (1, 2, 3))
TOKENS = torch.tensor([0, 2, 4, 6, 8, 10])
SUPPORTS = [Sampled(), TopK(5), TopK(5, "teacher"), TopK(5, "union"), Full()]
LORA = {"rank": 2, "targets": ["q_proj", "lm_head"]}


def mixed(reference, teacher, share):
    """log q by the definition: a geometric mean of two distributions, normalised."""
    return ((1 - share) * reference.log_softmax(-1) + share * teacher.log_softmax(-1)).log_softmax(-1)


def weights(path):
    """What a run trained: the whole student, or its adapters."""
    (file,) = latest_checkpoint(path).glob("*model.safetensors")
    return load_file(file)


# ---------------------------------------------------------------------------------------------------------------------
# Two models in float64


@pytest.fixture(scope="module")
def models(student_path, teacher_path):
    """Student, teacher and reference with different depths and temperatures, in float64."""
    paths = {"student": (student_path, 1.0), "teacher": (teacher_path, 1.5), "reference": (student_path, 0.8)}
    found = {name: load_model(ModelConfig(path=path, temperature=t), name) for name, (path, t) in paths.items()}
    for lm in found.values():
        lm.model.double()
        lm.reads = False  # dense log-softmax is taken of transformers' own pass, whose norms run in float32
    return found


@pytest.fixture(scope="module")
def scored(models):
    """(rollouts, the step with the student's own scores)."""
    rollouts = by_hand("110011", "111", "1011", "11111")
    flat = flatten(rollouts)
    student = score(models["student"], rollouts, flat, Full(), budget=1000, top_k=8)
    return rollouts, replace(flat, views={"student": student})


def of(models, scored, share, support, budget=1000):
    rollouts, flat = scored
    lm = model_of(View(TrustRegion(share=share), support), models["teacher"], models)
    return score(lm, rollouts, flat, support, budget=budget, top_k=4)


@pytest.mark.parametrize("budget", [1, 1000])
@pytest.mark.parametrize("share", [0.05, 0.7])
@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_every_support_has_the_scores_of_the_geometric_mean(models, scored, support, share, budget):
    rollouts, flat = scored
    truth = mixed(dense(models["reference"], rollouts), dense(models["teacher"], rollouts), share)
    got = of(models, scored, share, support, budget)
    assert (got.sampled - truth.gather(1, flat.tokens[:, None]).squeeze(1)).abs().max() < 1e-12
    assert (got.entropy + (truth.exp() * truth).sum(-1)).abs().max() < 1e-12
    assert (got.top - truth.topk(got.top.shape[1]).values).abs().max() < 1e-12
    if (c := got.candidates) is not None:
        assert ((c.teacher - truth.gather(1, c.ids)) * c.valid).abs().max() < 1e-12
        inside = torch.zeros_like(truth, dtype=torch.bool)
        for row, (ids, valid) in enumerate(zip(c.ids, c.valid, strict=True)):
            inside[row, ids[valid]] = True
        assert (c.teacher_tail - truth.masked_fill(inside, -torch.inf).logsumexp(-1)).abs().max() < 1e-11
    if got.full is not None:
        assert (got.full.log_probs(slice(None)) - truth).abs().max() < 1e-12


@pytest.mark.parametrize(("share", "name"), [(1.0, "teacher"), (0.0, "reference")])
@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
def test_its_limits_are_its_two_models_bit_for_bit(models, scored, support, share, name):
    rollouts, flat = scored
    got, alone = of(models, scored, share, support), score(models[name], rollouts, flat, support, budget=1000, top_k=4)
    assert torch.equal(got.sampled, alone.sampled) and torch.equal(got.top_ids, alone.top_ids)
    assert torch.equal(got.entropy, alone.entropy)
    if alone.candidates is not None:
        assert torch.equal(got.candidates.teacher, alone.candidates.teacher)
    if alone.full is not None:
        assert torch.equal(got.full.log_probs(slice(None)), alone.full.log_probs(slice(None)))


def test_it_holds_no_second_copy_of_a_head(models):
    head = model_of(View(TrustRegion()), models["teacher"], models).head()
    own, other = (models[name].model.get_output_embeddings().weight for name in ("teacher", "reference"))
    assert head.weight.data_ptr() == own.data_ptr() and head.reference.weight.data_ptr() == other.data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Heads of any shape, and gradients


def test_each_head_keeps_its_width_scale_cap_bias_and_low_rank():
    """Interpolated logits of two heads that differ in everything but the vocabulary."""

    def random(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    one = dict(
        weight=random(9, 4, seed=1), bias=random(9, seed=2), vocab=7, temperature=1.3, low_rank=random(9, 2, seed=3)
    )
    two = Head(random(7, 5, seed=4), scale=0.5, softcap=2.0)
    hidden = random(3, 11, seed=5)
    z = InterpolatedHead(**one, reference=two, share=0.3).logits(hidden)
    first = (hidden[:, :4] @ one["weight"][:7].T + hidden[:, 4:6] @ one["low_rank"][:7].T + one["bias"][:7]) / 1.3
    second = 2.0 * torch.tanh(0.5 * (hidden[:, 6:] @ two.weight.T) / 2.0)
    assert (z.log_softmax(-1) - mixed(second, first, 0.3)).abs().max() < 1e-13


def test_it_minimises_the_weighted_divergence_to_both():
    """In the paper's words: q minimises (1 - a) KL(q, reference) + a KL(q, teacher), and the least is -log Z."""
    a, r, t = 0.3, R.log_softmax(-1), Q.log_softmax(-1)
    head = InterpolatedHead(torch.eye(V, dtype=torch.float64), reference=identity(V), share=a)
    q = head.logits(torch.cat([Q, R], -1)).log_softmax(-1)

    def cost(x):
        return (1 - a) * (x.exp() * (x - r)).sum(-1) + a * (x.exp() * (x - t)).sum(-1)

    assert (cost(q) + ((1 - a) * r + a * t).logsumexp(-1)).abs().max() < 1e-13
    for seed in range(5):
        other = (q + 0.1 * logits(6, V, seed=10 + seed)).log_softmax(-1)
        assert bool((cost(other) > cost(q)).all())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_geometric_mean(share):
    method = build_method("sdpo", {"k": V, "trust": share})
    step = make_step(method, P, Q, TOKENS)
    head = InterpolatedHead(torch.eye(V, dtype=torch.float64), reference=identity(V), share=share)
    teacher = score_batch(head, torch.cat([Q, R], -1), step, TopK(V), 4)
    step = replace(step, views={**step.views, "teacher": teacher})
    loss, gradient = logit_gradient(method, P, step)
    leaf = P.clone().requires_grad_(True)
    p, q = leaf.log_softmax(-1), mixed(R, Q, share)
    m = ((p.exp() + q.exp()) / 2).log()
    by_hand_loss = ((q.exp() * (q - m) + p.exp() * (p - m)) / 2).sum(-1).mean()
    (by_hand_gradient,) = torch.autograd.grad(by_hand_loss, leaf)
    assert loss.item() == pytest.approx(by_hand_loss.item(), abs=1e-12)
    assert (gradient - by_hand_gradient).abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# In methods and recipes


@pytest.fixture
def trust_data(recipe_data):
    """SDPO between the student as it is and as it was, on plain text; every response counts as a success."""
    return recipe_data | {
        "method": {"name": "sdpo", "k": 8, "threshold": 0.0, "trust": 0.3},
        "teachers": {"teacher": {"path": "student:live"}, "reference": {"path": "student:base"}},
        "task": recipe_data["task"] | {"template": "plain"},
        "optim": {"lr": 5e-3},
    }


def test_it_is_a_value_that_prints_reads_and_serialises():
    method = sdpo(trust=0.01, reference="start")
    assert "TrustRegion(reference='start', share=0.01)" in str(method) and method.models == ("teacher", "start")
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    text = "View(TrustRegion('teacher', 'start', 0.01), TopK(100), Shown((Sibling(),)))"
    assert read(text, "view", "here") == method.views["teacher"]


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_first_update_is_that_of_either_model_and_the_second_is_not(trust_data, tmp_path, lora):
    """Both models are the student at first, so their trust region is too; after an update they differ."""

    def trained(name, steps, **changes):
        return run(trust_data, lora=lora, train__steps=steps, output=str(tmp_path / f"{name}{steps}"), **changes)

    plain = {"method": {"name": "sdpo", "k": 8, "threshold": 0.0}, "teachers": {"teacher": {"path": "student:live"}}}
    assert same(weights(trained("trust", 1)), weights(trained("live", 1, **plain)))
    two = trained("trust", 3)
    assert not same(weights(two), weights(trained("live", 3, **plain)))
    assert all(row["informed"] > 0 for row in metrics(two))


def test_a_share_of_one_is_a_run_with_the_teacher_alone(trust_data, tmp_path):
    one = run(trust_data, method__trust=1.0, train__steps=3, output=str(tmp_path / "one"))
    plain = {"method": {"name": "sdpo", "k": 8, "threshold": 0.0}, "teachers": {"teacher": {"path": "student:live"}}}
    alone = run(trust_data, **plain, train__steps=3, output=str(tmp_path / "alone"))
    assert same(weights(one), weights(alone))


def test_a_plan_counts_both_models(trust_data):
    both = changed(trust_data, teachers__reference__path="student:base")
    found = plan(parse_recipe(both), timed=False)
    assert set(found.models) == {"student", "teacher", "reference"} and found.models["reference"].bytes > 0
    assert View(TrustRegion()).part == 1.0 and View({"a": "x", "b": "y"}).part == 0.5


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TrustRegion(share=1.5), r"TrustRegion\(share=1.5\): expected the teacher's share, from 0 .* to 1"),
    (lambda: TrustRegion(share=-0.1), r"TrustRegion\(share=-0.1\): expected the teacher's share"),
    (lambda: TrustRegion("a", "a"), "teacher and reference are both 'a'"),
    (lambda: build_method("sdpo", {"trust": 2.0}), "expected the teacher's share"),
    (lambda: build_method("sdpo", {"reference": "x"}), "reference = 'x' has no effect without trust; set it"),
    (lambda: read("View(TrustRegion(share=2))", "view", "here"), "expected the teacher's share"),
])  # fmt: skip
def test_a_share_outside_its_range_and_names_without_effect_are_refused(make, message):
    with pytest.raises((MethodError, RecipeError), match=message):
        make()


@pytest.mark.parametrize(("changes", "message"), [
    ({"teachers": {"teacher": {"path": "student:live"}}},
     r"view 'teacher' asks for teacher 'reference'.*add teachers: \{reference"),
    ({"teachers__reference__path": "student:live"},
     "are both student:live, and a trust region between a model and itself has no effect"),
    ({"task__template": "chat", "teachers__reference": {"path": "student:base", "template": "own"}},
     r"interpolates 'teacher' and 'reference' on one prompt, but their template are 'student' and 'own'"),
])  # fmt: skip
def test_a_recipe_without_a_fitting_reference_stops_before_it_starts(trust_data, changes, message):
    with pytest.raises(RecipeError, match=message):
        set_up(parse_recipe(changed(trust_data, **changes)))


def test_a_method_of_ones_own_takes_it_on_the_sampled_token(trust_data):
    view = View(TrustRegion(share=0.5))
    method = Method(name="mine", views={"teacher": view}, terms=(Term(signal=log_ratio()),))
    assert method.models == ("teacher", "reference") and view.routes == "teacher"
    written = {
        "name": "compose",
        "views": {"teacher": "View(TrustRegion(share=0.5))"},
        "terms": ["Term(signal=log_ratio())"],
    }
    row = metrics(run(trust_data, method=written, train__steps=2))[1]
    assert row["grad_norm"] > 0
