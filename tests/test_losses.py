"""Losses and reductions by hand: small distributions, the direction of every divergence, tails and extremes.

The numbers were worked out outside the library; formulas that are checked on random input are written out densely.
"""

from math import e, log

import jaxtyping
import pytest
import torch
from synthetic import logit_gradient, logits, make_step
from torch import Tensor

from opdkit.divergences import MIXED, Kind, LogProbs, Tail, divergence, entries, log_mixture, on_support
from opdkit.losses import CrossEntropy, Divergence, PolicyGradient, SupportPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import minus
from opdkit.reduction import reduction
from opdkit.rows import StudentRows
from opdkit.signals import expected_log_ratio, log_ratio, support_gap
from opdkit.step import Candidates, Layout, Scores, Step
from opdkit.support import Full, Sampled, TopK

P = [0.5, 0.3, 0.2]
Q = [0.25, 0.25, 0.5]
REVERSE = 0.218011910943  # .5 ln 2 + .3 ln 1.2 + .2 ln .4
FORWARD = 0.239278181599  # .25 ln .5 + .25 ln (.25 / .3) + .5 ln 2.5
# mixtures: .25 -> (.4375, .2875, .275), .5 -> (.375, .275, .35), .75 -> (.3125, .2625, .425)
JSD = {0.25: 0.042900642761, 0.5: 0.055582470863, 0.75: 0.041033744892}
Case = tuple[Kind, float, float]  # kind, mix, alpha
KINDS: list[Case] = [
    ("reverse_kl", 0.5, 0.5), ("forward_kl", 0.5, 0.5), ("jsd", 0.1, 0.5), ("jsd", 0.5, 0.5), ("jsd", 0.9, 0.5),
    ("skew_forward_kl", 0.1, 0.5), ("skew_forward_kl", 0.9, 0.5), ("skew_reverse_kl", 0.1, 0.5),
    ("skew_reverse_kl", 0.9, 0.5), ("total_variation", 0.5, 0.5), ("alpha", 0.5, 0.2), ("alpha", 0.5, 0.5),
    ("alpha", 0.5, 0.9), ("cross_entropy", 0.5, 0.5),
]  # fmt: skip
METRICS = [c for c in KINDS if c[0] != "cross_entropy"]  # 0 at p = q
TAILS: tuple[Tail, ...] = ("bucket", "renormalise", "raw")


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def dense(case: Case, p: Tensor, q: Tensor) -> Tensor:
    """The definitions on probabilities, with the teacher's share `mix`."""
    kind, mix, alpha = case

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = mix * q + (1 - mix) * p
    return {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jsd": lambda: mix * kl(q, m) + (1 - mix) * kl(p, m),
        "skew_forward_kl": lambda: kl(q, m),
        "skew_reverse_kl": lambda: kl(p, m),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
        "alpha": lambda: ((q**alpha * p ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1)),
        "cross_entropy": lambda: -(q * p.log()).sum(-1),
    }[kind]()


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


@pytest.mark.parametrize(("kind", "mix", "alpha", "value"), [
    ("reverse_kl", 0.5, 0.5, REVERSE), ("forward_kl", 0.5, 0.5, FORWARD),
    *(("jsd", mix, 0.5, value) for mix, value in JSD.items()),
    # mixtures as above: .25 ln (.25 / .4375) + .25 ln (.25 / .2875) + .5 ln (.5 / .275); .5 ln (.5 / .375) + ...
    ("skew_forward_kl", 0.25, 0.5, 0.124074067800), ("skew_reverse_kl", 0.5, 0.5, 0.058021291736),
    ("total_variation", 0.5, 0.5, 0.3),  # (.25 + .05 + .3) / 2
    ("alpha", 0.5, 0.5, 0.225430258549),  # 4 (1 - sqrt(.125) - sqrt(.075) - sqrt(.1))
    ("cross_entropy", 0.5, 0.5, 1.278998952439),  # - .25 ln .5 - .25 ln .3 - .5 ln .2
])  # fmt: skip
def test_divergences_by_hand(kind, mix, alpha, value):
    assert divergence(logs(P), logs(Q), kind, mix, alpha).item() == pytest.approx(value, abs=1e-11)
    assert Divergence(kind, mix, alpha).full(LogProbs(logs(P)), LogProbs(logs(Q)))[0].item() == pytest.approx(
        value, abs=1e-11
    )


def test_two_tokens_by_hand():
    p, q = logs([0.5, 0.5]), logs([0.25, 0.75])
    assert divergence(p, q, "reverse_kl").item() == pytest.approx(0.5 * log(4 / 3), abs=1e-14)
    assert divergence(p, q, "forward_kl").item() == pytest.approx(0.75 * log(3) - log(2), abs=1e-14)


def test_mix_is_the_teachers_share():
    assert log_mixture(logs(P), logs(Q), 0.25).exp().tolist()[0] == pytest.approx([0.4375, 0.2875, 0.275], abs=1e-15)
    # Swapping the models mirrors the mix: a student's share of .25 is a different number.
    assert divergence(logs(Q), logs(P), "jsd", 0.75).item() == pytest.approx(JSD[0.25], abs=1e-11)
    assert divergence(logs(P), logs(Q), "jsd", 0.75).item() == pytest.approx(JSD[0.75], abs=1e-11)


def test_families_tend_to_the_two_kls():
    p, q = logits(20, 9, seed=1).log_softmax(-1), logits(20, 9, seed=2).log_softmax(-1)
    small = 1e-7
    forward, reverse = divergence(p, q, "forward_kl"), divergence(p, q, "reverse_kl")
    assert (forward - reverse).abs().max() > 0.1  # the two limits are told apart
    assert (divergence(p, q, "jsd", small) / small - forward).abs().max() < 1e-4
    assert (divergence(p, q, "jsd", 1 - small) / small - reverse).abs().max() < 1e-4
    assert (divergence(p, q, "skew_forward_kl", small) - forward).abs().max() < 1e-4
    assert (divergence(p, q, "skew_reverse_kl", 1 - small) - reverse).abs().max() < 1e-4
    assert (divergence(p, q, "alpha", 0.5, 1 - 1e-6) - forward).abs().max() < 1e-4
    assert (divergence(p, q, "alpha", 0.5, 1e-6) - reverse).abs().max() < 1e-4


def test_relations_between_the_kinds():
    p, q = logits(20, 9, seed=1).log_softmax(-1), logits(20, 9, seed=2).log_softmax(-1)
    entropy = -(q.exp() * q).sum(-1)
    assert (divergence(p, q, "cross_entropy") - entropy - divergence(p, q, "forward_kl")).abs().max() < 1e-14
    halves = divergence(p, q, "skew_forward_kl", 0.3) * 0.3 + divergence(p, q, "skew_reverse_kl", 0.3) * 0.7
    assert (halves - divergence(p, q, "jsd", 0.3)).abs().max() < 1e-14
    assert (divergence(p, q, "alpha", 0.5, 0.3) - divergence(q, p, "alpha", 0.5, 0.7)).abs().max() < 1e-14
    hellinger = 2 * ((p / 2).exp() - (q / 2).exp()).square().sum(-1)
    assert (divergence(p, q, "alpha") - hellinger).abs().max() < 1e-14


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_full_gradient_is_that_of_the_dense_formula(case):
    z, q = logits(6, 7, seed=3).requires_grad_(True), logits(6, 7, seed=4).softmax(-1)
    value = dense(case, z.softmax(-1), q)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    got_value, got_gradient = Divergence(*case).full(LogProbs(z.detach().log_softmax(-1)), LogProbs(q.log()))
    assert (got_value - value).abs().max() < 2e-14 and (got_gradient - gradient).abs().max() < 2e-14


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_full_gradient_against_finite_differences(case):
    z, q = logits(1, 5, seed=5), logits(1, 5, seed=6).softmax(-1)
    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    slopes = (dense(case, (z + steps).softmax(-1), q) - dense(case, (z - steps).softmax(-1), q)) / 2e-6
    assert (Divergence(*case).full(LogProbs(z.log_softmax(-1)), LogProbs(q.log()))[1][0] - slopes).abs().max() < 1e-8


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_slopes_are_derivatives_of_the_summands(case):
    p = logits(4, 6, seed=5).log_softmax(-1).requires_grad_(True)
    found = entries(LogProbs(p), LogProbs(logits(4, 6, seed=6).log_softmax(-1)), *case)
    (slope,) = torch.autograd.grad(found.value.sum(), p)
    assert (found.slope - found.free * found.mass - slope).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_at_the_teacher_the_gradient_vanishes_in_every_precision(case, dtype):
    p = logits(5, 300, seed=5).to(dtype).log_softmax(-1)
    value, gradient = Divergence(*case).full(LogProbs(p), LogProbs(p.clone()))
    assert gradient.abs().max() < 2 * torch.finfo(dtype).eps
    assert case[0] == "cross_entropy" or value.abs().max() < 20 * torch.finfo(dtype).eps


def test_total_variation_at_equality_has_subgradient_zero_and_ignores_rounding():
    p = logs([0.5, 0.3, 0.2]).float()
    near = p + torch.tensor([[1e-7, -2e-7, 1e-7]])  # what another pass over the same distribution returns
    for q in (p, near):
        value, gradient = Divergence("total_variation").full(LogProbs(p), LogProbs(q))
        assert value.item() == 0.0 and not gradient.any()
    value, gradient = Divergence("total_variation").full(LogProbs(p), LogProbs(logs([0.49, 0.3, 0.21]).float()))
    # side (+, 0, -) / 2: p_j (side_j - sum p side) with sum p side = .15
    assert value.item() == pytest.approx(0.01, abs=1e-7)
    assert gradient.tolist()[0] == pytest.approx([0.175, -0.045, -0.13], abs=1e-6)


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


def test_raw_candidates_by_hand():
    """The same rows, raw: log-probs over the whole vocabulary on ids {0, 2} and nothing for the rest."""
    p, q = logs([0.5, 0.3, 0.15, 0.05]).exp(), logs([0.2, 0.1, 0.6, 0.1]).exp()
    ids, valid = torch.tensor([[2, 3, 0]]), torch.tensor([[True, False, True]])
    for kind, value in {
        "reverse_kl": 0.5 * log(2.5) + 0.15 * log(0.25),
        "forward_kl": 0.2 * log(0.4) + 0.6 * log(4.0),
        "total_variation": (0.3 + 0.45) / 2,
        "alpha": 4 * ((0.5 + 0.2 + 0.15 + 0.6) / 2 - 0.1**0.5 - 0.09**0.5),
        "cross_entropy": -0.2 * log(0.5) - 0.6 * log(0.15),
    }.items():
        assert on_candidates(Divergence(kind, tail="raw"), p, q, ids, valid).item() == pytest.approx(value, abs=1e-14)


def test_invalid_columns_hold_no_mass_and_an_empty_set_no_divergence():
    p, q = logits(3, 6, seed=7).softmax(-1), logits(3, 6, seed=8).softmax(-1)
    ids, none = torch.tensor([[1, 4]] * 3), torch.zeros(3, 2, dtype=torch.bool)
    kept = torch.tensor([[True] * 5 + [False]] * 3)
    assert on_support(p.log(), None, kept, "renormalise").exp()[:, 5].tolist() == [0.0] * 3
    for tail in TAILS:
        for case in METRICS:
            assert on_candidates(Divergence(*case, tail=tail), p, q, ids, none).abs().max() < 1e-15


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_with_every_id_a_candidate_all_tails_are_the_full_divergence(case):
    p, q = logits(9, 12, seed=9), logits(9, 12, seed=10)
    step, tokens = {}, torch.zeros(9, dtype=torch.long)
    for tail in TAILS:
        method = Method(name="all", views={"teacher": View("teacher", TopK(12))},
                        terms=(Term(loss=Divergence(*case, tail=tail)),))  # fmt: skip
        step[tail] = logit_gradient(method, p, make_step(method, p, q, tokens, top_k=12))
    method = Method(name="full", views={"teacher": View("teacher", Full())}, terms=(Term(loss=Divergence(*case)),))
    loss, gradient = logit_gradient(method, p, make_step(method, p, q, tokens))
    for found, slope in step.values():
        assert abs(found - loss) < 1e-14 and (slope - gradient).abs().max() < 1e-14


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_tail_bucket_is_a_lower_bound_that_grows_with_the_support(case):
    p, q = logits(200, 12, seed=9).softmax(-1), logits(200, 12, seed=10).softmax(-1)
    order = p.argsort(-1, descending=True)
    previous = torch.zeros(200, dtype=torch.float64)
    for k in (1, 2, 4, 8, 11):
        value = on_candidates(Divergence(*case), p, q, order[:, :k], torch.ones(200, k, dtype=torch.bool))
        assert (value >= previous - 1e-14).all()
        previous = value
    full = dense(case, p, q)
    assert (previous <= full + 1e-13).all()  # with 11 of 12 ids the bucket is the twelfth: equal
    assert (previous - full).abs().max() < 1e-13


@pytest.mark.parametrize("case", METRICS, ids=str)
def test_tail_bucket_is_zero_only_where_both_agree_on_it(case):
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    same = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64)  # the difference is inside the bucket
    other = torch.tensor([[0.2, 0.15, 0.35, 0.3]], dtype=torch.float64)  # same ratio on the ids, other mass outside
    ids, valid = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    assert on_candidates(Divergence(*case), p, p, ids, valid).item() == pytest.approx(0.0, abs=1e-14)
    assert on_candidates(Divergence(*case), p, same, ids, valid).item() == pytest.approx(0.0, abs=1e-14)
    assert on_candidates(Divergence(*case), p, other, ids, valid).item() > 1e-3
    forgetful = Divergence(*case, tail="renormalise")
    assert on_candidates(forgetful, p, other, ids, valid).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_renormalising_one_candidate_has_no_gradient(case):
    method = Method(name="one", views={"teacher": View("teacher", TopK(1))},
                    terms=(Term(loss=Divergence(*case, tail="renormalise")),))  # fmt: skip
    p, q = logits(5, 9, seed=11), logits(5, 9, seed=12)
    step = make_step(method, p, q, torch.zeros(5, dtype=torch.long), top_k=1)
    assert logit_gradient(method, p, step)[1].abs().max() < 1e-16


# Raw tails: their bias


# What the list gains at student = teacher: the gradient is this x p_j ([j in list] - its mass), 0 for an honest form.
RAW_PUSH = {
    "reverse_kl": 1.0,
    "forward_kl": -1.0,
    "cross_entropy": -1.0,
    "jsd": 0.0,
    "total_variation": 0.0,
    "alpha": 0.0,
}


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_raw_tails_move_a_perfect_student(case):
    kind, mix, _ = case
    push = {"skew_forward_kl": mix - 1, "skew_reverse_kl": mix, **RAW_PUSH}[kind]
    p = logits(6, 20, seed=13)
    inside = torch.zeros(6, 20, dtype=torch.float64).scatter_(1, p.topk(5).indices, 1.0)
    mass = p.softmax(-1)
    expected = push * mass * (inside - (mass * inside).sum(-1, keepdim=True)) / 6
    for tail in TAILS:
        method = Method(name="raw", views={"teacher": View("teacher", TopK(5))},
                        terms=(Term(loss=Divergence(*case, tail=tail)),))  # fmt: skip
        found = logit_gradient(method, p, make_step(method, p, p, torch.zeros(6, dtype=torch.long), top_k=5))[1]
        assert (found - expected * (tail == "raw")).abs().max() < 1e-15
    assert push == 0 or expected.abs().max() > 1e-4


# V = 50, K = 8, top-k mass .75. Eight ids of .75 / 8, 42 of .25 / 42.
TOY = torch.cat([torch.full((8,), 0.75 / 8), torch.full((42,), 0.25 / 42)]).double()[None].log()


def toy_method(tail: Tail, kind: Kind = "forward_kl") -> Method:
    return Method(name="toy", views={"teacher": View("teacher", TopK(8, "teacher"))},
                  terms=(Term(loss=Divergence(kind, tail=tail)),))  # fmt: skip


def descend(method: Method, z: Tensor, steps: int, rate: float) -> tuple[float, Tensor]:
    """Gradient descent on a fixed list: (the last loss, the logits)."""
    step = make_step(method, z, TOY, torch.tensor([0]), top_k=8)
    loss = 0.0
    for _ in range(steps):
        value, gradient = logit_gradient(method, z, step)
        loss, z = value.item(), z - rate * gradient
    return loss, z


def test_raw_topk_forward_kl_pushes_a_perfect_student_and_the_other_tails_do_not():
    for tail in TAILS:
        method = toy_method(tail)
        loss, push = logit_gradient(method, TOY, make_step(method, TOY, TOY, torch.tensor([0]), top_k=8))
        assert abs(loss) < 1e-15
        if tail == "raw":
            assert push[0, 0].item() == pytest.approx(-0.75 / 8 * 0.25, abs=1e-9)  # q (Q - 1), Q = .75 the list's mass
            assert push[0, 49].item() == pytest.approx(0.25 / 42 * 0.75, abs=1e-9)  # q Q
        else:
            assert push.abs().max() < 1e-16


def test_descending_raw_forward_kl_loses_the_tail_and_the_bucket_restores_it():
    loss, z = descend(toy_method("raw"), TOY, 120, 32.0)
    assert z.softmax(-1)[0, :8].sum() > 0.995 and loss < -0.21  # it reports -.75 ln(1 / .75)
    assert divergence(z.log_softmax(-1), TOY, "forward_kl").item() > 0.9
    _, z = descend(toy_method("bucket"), z, 50, 8.0)
    assert z.softmax(-1)[0, :8].sum().item() == pytest.approx(0.75, abs=1e-3)  # the leaked mass is pulled back


def test_raw_reverse_kl_is_minimised_by_leaving_the_list():
    """sum_S p log(p / q) is least at p = q / e, where it is - Q / e: a third of the teacher's mass is what it asks for."""
    kept = TOY.exp().clone()
    kept[:, :8] /= e
    kept[:, 8:] *= (1 - 0.75 / e) / 0.25
    method = toy_method("raw", "reverse_kl")
    loss, gradient = logit_gradient(method, kept.log(), make_step(method, kept.log(), TOY, torch.tensor([0]), top_k=8))
    assert loss.item() == pytest.approx(-0.75 / e, abs=1e-7) and gradient.abs().max() < 1e-8
    assert divergence(kept.log(), TOY, "reverse_kl").item() > 0.4
    loss, z = descend(method, TOY, 100, 16.0)  # and from the teacher itself it gets there
    assert loss == pytest.approx(-0.75 / e, abs=1e-4)
    assert z.softmax(-1)[0, :8].sum().item() == pytest.approx(0.75 / e, abs=1e-2)


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
    ({"kind": "kl"}, r"kind is 'kl'; expected one of reverse_kl, forward_kl, jsd, "),
    ({"kind": "jsd", "mix": 0.0}, r"mix = 0.0 must lie strictly between 0 and 1; the ends are forward_kl \(0\) and"),
    ({"kind": "jsd", "mix": 1.0}, r"mix = 1.0 must lie strictly"),
    ({"kind": "skew_forward_kl", "mix": 0.0}, "mix = 0.0 must lie .*; 0 is forward_kl"),
    ({"kind": "skew_reverse_kl", "mix": 1.0}, "mix = 1.0 must lie .*; 1 is reverse_kl"),
    ({"kind": "reverse_kl", "mix": 0.3}, "mix = 0.3 has no effect on reverse_kl; only jsd, skew_forward_kl, skew_r"),
    ({"kind": "forward_kl", "mix": 1.5}, "mix = 1.5 has no effect on forward_kl"),
    ({"kind": "jsd", "alpha": 0.3}, "alpha = 0.3 has no effect on jsd; only kind alpha reads it"),
    ({"kind": "alpha", "alpha": 0.0}, r"alpha = 0.0 must lie in \[0.001, 0.999\]: near 0 take reverse_kl and near 1 forward"),
    ({"kind": "alpha", "alpha": 1.0}, "alpha = 1.0 must lie in"),
    ({"kind": "alpha", "alpha": 2.0}, "alpha = 2.0 .* outside .* infinite where one side has no mass"),
    ({"tail": "drop"}, "tail is 'drop'; expected one of bucket, renormalise, raw"),
    ({"row_max": 0.0}, "row_max = 0.0 nats must be positive; None is no limit"),
    ({"entry_max": -1.0}, "entry_max = -1.0 nats must be positive"),
])  # fmt: skip
def test_wrong_divergence_arguments(unchecked, arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_hints_of_a_wrong_mix_exist_for_every_kind_that_reads_it():
    for kind in MIXED:
        with pytest.raises(ValueError, match=r"mix = 1.5 must lie strictly between 0 and 1; "):
            Divergence(kind, 1.5)


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
EXTREMES = [
    *((Divergence(*case), None, Full()) for case in KINDS),
    *((Divergence(*case, entry_max=1.0, row_max=1.0), None, Full()) for case in KINDS),
    *((Divergence(*case, tail=tail), None, TopK(2, of)) for case in KINDS for tail in TAILS
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


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_outcomes_without_mass_are_finite_in_float32(case):
    none = -1e4
    p = torch.tensor([[0.0, none, none, none], [log(0.5), log(0.5), none, none]])
    for q in (p.flip(0), p.flip(1), p):
        for loss in (Divergence(*case), Divergence(*case, entry_max=0.5, row_max=2.0)):
            value, gradient = loss.full(LogProbs(p), LogProbs(q))
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_far_divergences_have_their_limits():
    p, q = FAR[1:2].log_softmax(-1), FAR_TEACHER[1:2].log_softmax(-1)  # all mass on one token each, 160 nats apart
    assert Divergence("reverse_kl").full(LogProbs(p), LogProbs(q))[0].item() == pytest.approx(160.0)
    assert Divergence("forward_kl").full(LogProbs(p), LogProbs(q))[0].item() == pytest.approx(160.0)
    value, gradient = Divergence("jsd", 0.25).full(LogProbs(p), LogProbs(q))
    assert value.item() == pytest.approx(0.25 * log(4) + 0.75 * log(4 / 3), rel=1e-6)  # the entropy of the mixing share
    assert gradient.abs().max() < 1e-6
