"""G-OPD: the identities of its card, and the exact gradient towards the extrapolated target."""

import pytest
import torch
from synthetic import identity, logit_gradient, logits, make_step

from opdkit.catalogue import build_method
from opdkit.errors import RecipeError
from opdkit.losses import ClippedPolicyGradient
from opdkit.step import Scores, Step
from opdkit.support import Sampled
from opdkit.train.update import streams
from opdkit.views.local import score_batch
from opdkit.weights import ones

V = 40
P, T, B = logits(V, seed=1), logits(V, seed=2), logits(V, seed=3)


def step_of(method, p, teacher, reference, **fields) -> Step:
    """Every token of one prefix, sampled by the student with logits p."""
    rows = [x.expand(V, V).contiguous() for x in (p, teacher, reference)]
    step = make_step(method, *rows[:2], torch.arange(V), **fields)
    views = dict(step.views)
    if "reference" in method.views:
        views["reference"] = score_batch(identity(V), rows[2], step, Sampled(), 4)
    return Step(step.layout, step.tokens, views, **fields)


def advantage(arguments, p=P, teacher=T, reference=B, **fields):
    method = build_method("gopd", arguments)
    return method.terms[0].signal(step_of(method, p, teacher, reference, **fields))


def gradient(arguments, p=P, teacher=T, reference=B):
    method = build_method("gopd", arguments)
    rows = logit_gradient(method, p.expand(V, V).contiguous(), step_of(method, p, teacher, reference))[1]
    return (p.softmax(-1)[:, None] * rows).sum(0) * V


def target(lam, teacher=T, reference=B):
    """log of the per-prefix optimum q^lam b^(1 - lam) / Z, and log Z."""
    mixed = lam * teacher.log_softmax(-1) + (1 - lam) * reference.log_softmax(-1)
    return mixed.log_softmax(-1), mixed.logsumexp(-1)


def kl_gradient(p, target_logp):
    leaf = p.clone().requires_grad_(True)
    own = leaf.log_softmax(-1)
    return torch.autograd.grad((own.exp() * (own - target_logp)).sum(), leaf)[0]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_the_advantage_is_the_papers(lam):
    p, q, b = (x.log_softmax(-1) for x in (P, T, B))
    assert (advantage({"lam": lam}) - (lam * q - p - (lam - 1) * b)).abs().max() < 1e-13


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_the_expected_gradient_is_that_of_the_kl_to_the_extrapolated_target(lam):
    assert (gradient({"lam": lam}) - kl_gradient(P, target(lam)[0])).abs().max() < 1e-12


def test_identities_of_the_card():
    p, b = P.log_softmax(-1), B.log_softmax(-1)
    opd = build_method("opd", {}).terms[0].signal
    plain = opd(step_of(build_method("opd", {}), P, T, B))
    assert torch.equal(advantage({"lam": 1.0}), plain)  # lam 1: plain OPD
    assert (advantage({"lam": 0.0}) - (b - p)).abs().max() < 1e-13  # lam 0: towards the reference
    for lam in (0.3, 1.25, 2.0):
        assert (advantage({"lam": lam}, reference=T) - plain).abs().max() < 1e-13  # a reference that is the teacher
        best, log_z = target(lam)
        assert (advantage({"lam": lam}, p=best) - log_z).abs().max() < 1e-12  # at the optimum: one constant
        assert log_z * (lam - 1) > 0  # Z > 1 beyond the teacher, < 1 between
        assert gradient({"lam": lam}, p=best).abs().max() < 1e-13  # a constant has no expected gradient
        mean = (p.exp() * advantage({"lam": lam})).sum()
        assert (mean - (log_z - (p.exp() * (p - best)).sum())).abs() < 1e-12


def test_lam_moves_over_the_run():
    """lam .5 -> 1.5 over the first half: .5, 1, 1.5, 1.5 at progress 0, .25, .5, 1."""
    p, q, b = (x.log_softmax(-1) for x in (P, T, B))
    for progress, lam in [(0.0, 0.5), (0.25, 1.0), (0.5, 1.5), (1.0, 1.5)]:
        found = advantage({"lam": 0.5, "lam_end": 1.5, "until": 0.5}, progress=progress)
        assert (found - (lam * q - p - (lam - 1) * b)).abs().max() < 1e-12
    found = advantage({"lam": 1.0, "lam_end": 1.25}, progress=0.5)
    assert (found - (1.125 * q - p - 0.125 * b)).abs().max() < 1e-12


def test_the_weight_is_the_capped_ratio_to_the_sampler():
    method = build_method("gopd", {})
    step = step_of(method, P, T, B)
    assert torch.equal(method.terms[0].weight(step), torch.ones(V, dtype=torch.float64))
    gap = torch.linspace(-2.0, 3.0, V, dtype=torch.float64)
    views = {**step.views, "behaviour": Scores(step.views["student"].sampled - gap)}
    found = streams(method, {"policy": Step(step.layout, step.tokens, views)})["policy"][0].weight
    assert (found - gap.exp().clamp(max=5.0)).abs().max() < 1e-12 and not found.requires_grad


def test_views_loss_and_arguments():
    method = build_method("gopd", {})
    assert list(method.views) == ["teacher", "reference"] and method.models == ("teacher", "reference")
    assert method.terms[0].loss == ClippedPolicyGradient(0.2, 0.2, 3.0)
    assert build_method("gopd", {"reference": "before_rl"}).views["reference"].model == "before_rl"
    plain = build_method("gopd", {"lam": 1.0, "importance_cap": None, "low": None, "high": None, "dual": None})
    assert list(plain.views) == ["teacher"] and plain.terms[0].weight == ones()
    assert plain.terms[0].signal == build_method("opd", {}).terms[0].signal
    assert list(build_method("gopd", {"lam": 1.0, "lam_end": 1.0}).views) == ["teacher"]
    assert list(build_method("gopd", {"lam": 1.0, "lam_end": 1.5}).views) == ["teacher", "reference"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"lam": -0.5}, "lam = -0.5, lam_end = None: expected at least 0"),
    ({"lam_end": -1.0}, "lam = 1.25, lam_end = -1.0: expected at least 0"),
    ({"until": 0.5}, "until = 0.5 has no effect without lam_end"),
    ({"lam": 1.0, "reference": "base"}, "reference = 'base' has no effect at lam = 1"),
    ({"lam": 1.0, "reference": "base", "lam_end": 1.0}, "reference = 'base' has no effect at lam = 1"),
    ({"dual": 1.0}, "dual = 1.0 must be above 1"),
])  # fmt: skip
def test_arguments_without_effect_or_sense_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=f"method gopd: {message}"):
        build_method("gopd", arguments)
