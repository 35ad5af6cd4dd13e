"""Losses and reductions by hand: small distributions, the direction of every divergence, tails and extremes.

The numbers were worked out outside the library; formulas that are checked on random input are written out densely.
"""

from math import log
from typing import Literal

import jaxtyping
import pytest
import torch
from synthetic import logit_gradient, logits, make_step
from torch import Tensor

from opdkit.losses import (
    CrossEntropy,
    Divergence,
    Kind,
    PolicyGradient,
    StudentRows,
    SupportPolicyGradient,
    divergence,
    log_mixture,
    on_support,
)
from opdkit.method import Method, Term, View
from opdkit.pieces import minus
from opdkit.reduction import reduction
from opdkit.signals import expected_log_ratio, log_ratio, support_gap
from opdkit.step import Candidates, Layout, Scores, Step
from opdkit.support import Full, Sampled, TopK

P = [0.5, 0.3, 0.2]
Q = [0.25, 0.25, 0.5]
REVERSE = 0.218011910943  # .5 ln 2 + .3 ln 1.2 + .2 ln .4
FORWARD = 0.239278181599  # .25 ln .5 + .25 ln (.25 / .3) + .5 ln 2.5
# mixtures: .25 -> (.4375, .2875, .275), .5 -> (.375, .275, .35), .75 -> (.3125, .2625, .425)
JSD = {0.25: 0.042900642761, 0.5: 0.055582470863, 0.75: 0.041033744892}
KINDS: list[tuple[Kind, float]] = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def dense(kind: str, mix: float, p: Tensor, q: Tensor) -> Tensor:
    """The definitions on probabilities, with the teacher's share `mix`."""
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    m = mix * q + (1 - mix) * p
    return mix * (q * (q / m).log()).sum(-1) + (1 - mix) * (p * (p / m).log()).sum(-1)


def on_candidates(loss: Divergence, p: Tensor, q: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """The loss on candidates of dense probabilities [n, V], through the row-wise interface that the head calls."""
    outside = torch.ones_like(p, dtype=torch.bool)
    for row in range(p.shape[0]):
        outside[row, ids[row][valid[row]]] = False
    tails = [(probs * outside).sum(-1).log() for probs in (p, q)]
    found = Candidates(ids, valid, p.gather(1, ids).log(), q.gather(1, ids).log(), None, tails[1])
    zero = torch.zeros(p.shape[0], dtype=p.dtype)
    axis = torch.arange(p.shape[0])
    step = Step(Layout(axis, axis, axis), axis, {"teacher": Scores(zero, candidates=found)})
    return loss.rows(StudentRows(None, p.gather(1, ids).log(), tails[0]), step, None)


# Divergences


@pytest.mark.parametrize(("kind", "mix", "value"), [
    ("reverse_kl", 0.5, REVERSE), ("forward_kl", 0.5, FORWARD), *(("jsd", mix, value) for mix, value in JSD.items())
])  # fmt: skip
def test_divergences_by_hand(kind, mix, value):
    assert divergence(logs(P), logs(Q), kind, mix).item() == pytest.approx(value, abs=1e-11)
    assert Divergence(kind, mix).full(logs(P), logs(Q))[0].item() == pytest.approx(value, abs=1e-11)


def test_two_tokens_by_hand():
    p, q = logs([0.5, 0.5]), logs([0.25, 0.75])
    assert divergence(p, q, "reverse_kl").item() == pytest.approx(0.5 * log(4 / 3), abs=1e-14)
    assert divergence(p, q, "forward_kl").item() == pytest.approx(0.75 * log(3) - log(2), abs=1e-14)


def test_mix_is_the_teachers_share():
    assert log_mixture(logs(P), logs(Q), 0.25).exp().tolist()[0] == pytest.approx([0.4375, 0.2875, 0.275], abs=1e-15)
    # Swapping the models mirrors the mix: a student's share of .25 is a different number.
    assert divergence(logs(Q), logs(P), "jsd", 0.75).item() == pytest.approx(JSD[0.25], abs=1e-11)
    assert divergence(logs(P), logs(Q), "jsd", 0.75).item() == pytest.approx(JSD[0.75], abs=1e-11)


def test_jsd_tends_to_the_two_kls():
    p, q = logits(20, 9, seed=1).log_softmax(-1), logits(20, 9, seed=2).log_softmax(-1)
    small = 1e-7
    forward, reverse = dense("forward_kl", 0, p.exp(), q.exp()), dense("reverse_kl", 0, p.exp(), q.exp())
    assert (divergence(p, q, "jsd", small) / small - forward).abs().max() < 1e-4
    assert (divergence(p, q, "jsd", 1 - small) / small - reverse).abs().max() < 1e-4
    assert (forward - reverse).abs().max() > 0.1  # the two limits are told apart


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_full_gradient_is_that_of_the_dense_formula(kind, mix):
    z, q = logits(6, 7, seed=3).requires_grad_(True), logits(6, 7, seed=4).softmax(-1)
    value = dense(kind, mix, z.softmax(-1), q)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    got_value, got_gradient = Divergence(kind, mix).full(z.detach().log_softmax(-1), q.log())
    assert (got_value - value).abs().max() < 1e-14 and (got_gradient - gradient).abs().max() < 1e-14


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_full_gradient_against_finite_differences(kind, mix):
    z, q = logits(1, 5, seed=5), logits(1, 5, seed=6).softmax(-1)
    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    slopes = (dense(kind, mix, (z + steps).softmax(-1), q) - dense(kind, mix, (z - steps).softmax(-1), q)) / 2e-6
    assert (Divergence(kind, mix).full(z.log_softmax(-1), q.log())[1][0] - slopes).abs().max() < 1e-9


# Supports and tails


@pytest.mark.parametrize(("kind", "tail", "value"), [
    ("reverse_kl", "bucket", 0.446066737546), ("forward_kl", "bucket", 0.536595312710),
    ("reverse_kl", "renormalise", 0.592564305961), ("forward_kl", "renormalise", 0.603008723093),
])  # fmt: skip
def test_candidates_by_hand(kind, tail, value):
    """p = (.5, .3, .15, .05), q = (.2, .1, .6, .1) on ids {0, 2}: bucket (.5, .15, .35) against (.2, .6, .2),
    renormalised (10/13, 3/13) against (1/4, 3/4)."""
    p, q = logs([0.5, 0.3, 0.15, 0.05]).exp(), logs([0.2, 0.1, 0.6, 0.1]).exp()
    ids, valid = torch.tensor([[2, 3, 0]]), torch.tensor([[True, False, True]])
    assert on_candidates(Divergence(kind, tail=tail), p, q, ids, valid).item() == pytest.approx(value, abs=1e-11)


def test_invalid_columns_hold_no_mass_and_an_empty_set_no_divergence():
    p, q = logits(3, 6, seed=7).softmax(-1), logits(3, 6, seed=8).softmax(-1)
    ids, none = torch.tensor([[1, 4]] * 3), torch.zeros(3, 2, dtype=torch.bool)
    kept = torch.tensor([[True] * 5 + [False]] * 3)
    assert on_support(p.log(), None, kept, "renormalise").exp()[:, 5].tolist() == [0.0] * 3
    for tail in ("bucket", "renormalise"):
        assert on_candidates(Divergence(tail=tail), p, q, ids, none).abs().max() < 1e-15


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_tail_bucket_is_a_lower_bound_that_grows_with_the_support(kind, mix):
    p, q = logits(200, 12, seed=9).softmax(-1), logits(200, 12, seed=10).softmax(-1)
    order = p.argsort(-1, descending=True)
    previous = torch.zeros(200, dtype=torch.float64)
    for k in (1, 2, 4, 8, 11):
        value = on_candidates(Divergence(kind, mix), p, q, order[:, :k], torch.ones(200, k, dtype=torch.bool))
        assert (value >= previous - 1e-14).all()
        previous = value
    full = dense(kind, mix, p, q)
    assert (previous <= full + 1e-14).all()  # with 11 of 12 ids the bucket is the twelfth: equal
    assert (previous - full).abs().max() < 1e-13


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_tail_bucket_is_zero_only_where_both_agree_on_it(kind, mix):
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    same = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64)  # the difference is inside the bucket
    other = torch.tensor([[0.2, 0.15, 0.35, 0.3]], dtype=torch.float64)  # same ratio on the ids, other mass outside
    ids, valid = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    assert on_candidates(Divergence(kind, mix), p, p, ids, valid).item() == pytest.approx(0.0, abs=1e-15)
    assert on_candidates(Divergence(kind, mix), p, same, ids, valid).item() == pytest.approx(0.0, abs=1e-15)
    assert on_candidates(Divergence(kind, mix), p, other, ids, valid).item() > 0.01
    forgetful = Divergence(kind, mix, tail="renormalise")
    assert on_candidates(forgetful, p, other, ids, valid).item() == pytest.approx(0.0, abs=1e-15)


# V = 50, K = 8, top-k mass .75. Eight ids of .75 / 8, 42 of .25 / 42.
TOY = torch.cat([torch.full((8,), 0.75 / 8), torch.full((42,), 0.25 / 42)]).double()[None].log()


def toy_method(tail: Literal["bucket", "renormalise"]) -> Method:
    return Method(name="toy", views={"teacher": View("teacher", TopK(8, "teacher"))},
                  terms=(Term(loss=Divergence("forward_kl", tail=tail)),))  # fmt: skip


def untailed(z: Tensor) -> Tensor:
    """Forward KL over the teacher's top-k without its tail: sum_{top 8} q (log q - log p), as widely released."""
    return (TOY.exp() * (TOY - z.log_softmax(-1)))[:, :8].sum()


def test_untailed_topk_forward_kl_pushes_a_perfect_student_and_ours_does_not():
    z = TOY.clone().requires_grad_(True)
    (push,) = torch.autograd.grad(untailed(z), z)
    assert push[0, 0].item() == pytest.approx(-0.75 / 8 * 0.25, abs=1e-9)  # q (Q - 1), Q = .75 being the top-k mass
    assert push[0, 49].item() == pytest.approx(0.25 / 42 * 0.75, abs=1e-9)  # q Q
    for tail in ("bucket", "renormalise"):
        method = toy_method(tail)
        step = make_step(method, TOY, TOY, torch.tensor([0]), top_k=8)
        loss, gradient = logit_gradient(method, TOY, step)
        assert abs(loss) < 1e-15 and gradient.abs().max() < 1e-16


def test_descending_the_untailed_form_loses_the_tail_and_the_bucket_keeps_it():
    z = TOY.clone().requires_grad_(True)
    for _ in range(500):
        (gradient,) = torch.autograd.grad(untailed(z), z)
        z = (z - 8.0 * gradient).detach().requires_grad_(True)
    assert z.softmax(-1)[0, :8].sum() > 0.995 and untailed(z) < -0.21  # it reports -.75 ln(1 / .75)
    assert dense("forward_kl", 0, z.softmax(-1), TOY.exp()).item() > 0.9

    method = toy_method("bucket")
    z = z.detach()
    step = make_step(method, z, TOY, torch.tensor([0]), top_k=8)
    for _ in range(50):
        z = z - 8.0 * logit_gradient(method, z, step)[1]
    assert z.softmax(-1)[0, :8].sum().item() == pytest.approx(0.75, abs=1e-3)  # the leaked mass is pulled back


# The losses of a sampled token and of candidate actions


def test_row_losses_by_hand():
    sampled = torch.tensor([-1.0, -2.0])
    table = torch.tensor([[-1.0, -3.0], [-2.0, -0.5]])
    one, many = StudentRows(sampled, None, None), StudentRows(None, table, None)
    axis = torch.arange(2)
    step = Step(Layout(axis, axis, axis), axis, {"teacher": Scores(sampled)})
    assert CrossEntropy().rows(one, step, None).tolist() == [1.0, 2.0]
    assert PolicyGradient().rows(one, step, torch.tensor([3.0, -0.5])).tolist() == [3.0, -1.0]
    signal = torch.tensor([[1.0, 2.0], [0.0, -4.0]])
    assert SupportPolicyGradient().rows(many, step, signal).tolist() == [7.0, -2.0]


# Arguments


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kind": "kl"}, r"kind is 'kl'; expected reverse_kl, forward_kl or jsd"),
    ({"kind": "jsd", "mix": 0.0}, "mix = 0.0 must lie strictly between 0 and 1; the ends are forward_kl and"),
    ({"kind": "jsd", "mix": 1.0}, r"mix = 1.0 must lie strictly"),
    ({"kind": "reverse_kl", "mix": 0.3}, r"mix = 0.3 has no effect on reverse_kl; only jsd reads it"),
    ({"kind": "forward_kl", "mix": 0.3}, r"mix = 0.3 has no effect on forward_kl"),
    ({"tail": "drop"}, r"tail is 'drop'; expected 'bucket' or 'renormalise'"),
])  # fmt: skip
def test_wrong_divergence_arguments(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"k": 0}, r"TopK\(k=0\): k must be at least 1"),
    ({"k": 4, "of": "both"}, r"TopK\(of='both'\): expected student, teacher, union, intersection or difference"),
])  # fmt: skip
def test_wrong_support_arguments(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        TopK(**arguments)


# Reductions: sequences of 1, 2 and 5 trained tokens; the third token of the last one has weight zero

SEQ = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2])
LAYOUT = Layout(SEQ, SEQ, torch.arange(3))
COUNTED = torch.tensor([True, True, True, True, True, False, True, True])
THIRD = 1 / 3


@pytest.mark.parametrize(("name", "value"), [
    ("token_mean", [1 / 7] * 5 + [0.0] + [1 / 7] * 2),
    ("seq_mean_token_mean", [THIRD, THIRD / 2, THIRD / 2, THIRD / 4, THIRD / 4, 0.0, THIRD / 4, THIRD / 4]),
    ("seq_mean_token_sum", [THIRD] * 5 + [0.0] + [THIRD] * 2),
    ("seq_mean_token_sum_norm", [THIRD / 10] * 5 + [0.0] + [THIRD / 10] * 2),
])  # fmt: skip
def test_reductions_by_hand(name, value):
    assert reduction(name, LAYOUT, COUNTED, 10).tolist() == pytest.approx(value, abs=1e-16)


def test_a_sequence_without_counted_tokens_does_not_count():
    found = [reduction(name, LAYOUT, COUNTED & (SEQ > 0), 10).tolist()
             for name in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")]  # fmt: skip
    assert found[0] == pytest.approx([0.0] + [1 / 6] * 4 + [0.0] + [1 / 6] * 2)
    assert found[1] == pytest.approx([0.0, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 0.0, 1 / 8, 1 / 8])
    assert found[2] == pytest.approx([0.0] + [0.5] * 4 + [0.0] + [0.5] * 2)


@pytest.mark.parametrize("name", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"])
def test_no_counted_token_gives_zero_and_not_nan(name):
    assert reduction(name, LAYOUT, torch.zeros(8, dtype=torch.bool), 10).tolist() == [0.0] * 8


def test_wrong_reductions(unchecked):
    with pytest.raises(ValueError, match="divides by the response limit, but the step has none"):
        reduction("seq_mean_token_sum_norm", LAYOUT, COUNTED, 0)
    with pytest.raises(ValueError, match="reduction is 'mean'; expected one of token_mean"):
        reduction("mean", LAYOUT, COUNTED, 0)


# Extremes: logits of +-80 in float32

FAR = 80 * torch.tensor([[1.0, -1, 0, -1, 1], [1, -1, -1, -1, -1], [0, 0, 0, 0, 0]])
FAR_TEACHER = 80 * torch.tensor([[-1.0, 1, 0, 1, -1], [-1, 1, -1, -1, -1], [1, -1, 0, 0, 0]])
TAILS: tuple[Literal["bucket", "renormalise"], ...] = ("bucket", "renormalise")
EXTREMES = [
    *((Divergence(kind, mix), None, Full()) for kind, mix in KINDS),
    *((Divergence(kind, mix, tail=tail), None, TopK(2, of)) for kind, mix in KINDS for tail in TAILS
      for of in ("student", "teacher", "union", "intersection", "difference")),
    *((SupportPolicyGradient(), support_gap(by=by), TopK(2, "union")) for by in ("student", "teacher", "uniform")),
    (PolicyGradient(), log_ratio(), Sampled()),
    (PolicyGradient(), minus(log_ratio(), expected_log_ratio()), Full()),
    (PolicyGradient(), minus(log_ratio(), expected_log_ratio()), TopK(2)),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "signal", "support"), EXTREMES, ids=str)
def test_far_logits_in_float32_are_finite(loss, signal, support):
    method = Method(name="far", views={"teacher": View("teacher", support)}, terms=(Term(loss=loss, signal=signal),))
    for p, q in ((FAR, FAR_TEACHER), (FAR_TEACHER, FAR), (FAR, FAR)):
        step = make_step(method, p, q, torch.tensor([1, 1, 2]), top_k=2)
        value, gradient = logit_gradient(method, p, step)
        assert value.dtype == gradient.dtype == torch.float32
        assert torch.isfinite(value) and torch.isfinite(gradient).all()


def test_far_divergences_have_their_limits():
    p, q = FAR[1:2].log_softmax(-1), FAR_TEACHER[1:2].log_softmax(-1)  # all mass on one token each, 160 nats apart
    assert Divergence("reverse_kl").full(p, q)[0].item() == pytest.approx(160.0)
    assert Divergence("forward_kl").full(p, q)[0].item() == pytest.approx(160.0)
    value, gradient = Divergence("jsd", 0.25).full(p, q)
    assert value.item() == pytest.approx(0.25 * log(4) + 0.75 * log(4 / 3), rel=1e-6)  # the entropy of the mixing share
    assert gradient.abs().max() < 1e-6
