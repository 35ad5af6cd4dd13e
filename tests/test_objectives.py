"""Objectives beyond plain divergences: ratios and clips, importance weights, estimators on the sampled token, clamps by
name, future sums, baselines. Hand-computed numbers and exact enumeration in float64."""

import itertools
from dataclasses import replace
from math import exp, log

import jaxtyping
import pytest
import torch
from synthetic import expected_gradient, identity, logit_gradient, logits, make_step
from torch import Tensor

from opdkit.divergences import LogProbs, divergence
from opdkit.errors import MethodError
from opdkit.head import RowTerm, objective
from opdkit.losses import (
    ClippedPolicyGradient,
    Divergence,
    Entropy,
    PolicyGradient,
    SampledDivergence,
    SupportPolicyGradient,
)
from opdkit.method import Linear, Method, Term, View
from opdkit.pieces import Piece, minus, piece, plus, scale, times
from opdkit.rows import StudentRows
from opdkit.signals import (
    clamp,
    clip_low,
    discounted,
    expected_log_ratio,
    floor,
    log_ratio,
    outcome,
    scheduled,
    support_gap,
)
from opdkit.sources import Dataset, OnPolicy
from opdkit.step import Candidates, Layout, Scores, Step
from opdkit.support import Full, TopK
from opdkit.weights import confidence, first_tokens, importance, ones


def layout_of(*lengths: int) -> Layout:
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Layout(seq, seq, torch.arange(len(lengths)))


def step_with(layout: Layout, **views: list[float]) -> Step:
    """A step whose views hold the given log-probs of the sampled tokens."""
    scores = {name: Scores(torch.tensor(x, dtype=torch.float64)) for name, x in views.items()}
    return Step(layout, torch.zeros(layout.seq.numel(), dtype=torch.long), scores)


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# Ratios and clips

# ratio, A -> value of - min(r A, clip(r, .8, 1.28) A), and of the dual form with c = 3
CLIP = [
    (1.0, 2.0, -2.0, -2.0, False), (1.2, 2.0, -2.4, -2.4, False), (1.5, 2.0, -2.56, -2.56, True),
    (0.5, 2.0, -1.0, -1.0, False), (1.0, -2.0, 2.0, 2.0, False), (0.9, -2.0, 1.8, 1.8, False),
    (0.5, -2.0, 1.6, 1.6, True), (1.5, -2.0, 3.0, 3.0, False), (4.0, -2.0, 8.0, 6.0, False), (4.0, 0.0, 0.0, 0.0, True),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "signal", "value", "dual", "clipped"), CLIP)
def test_clip_by_hand(ratio, signal, value, dual, clipped):
    step = step_with(layout_of(1), student=[-1.0])
    for bound, expected in ((None, value), (3.0, dual)):
        now = torch.tensor([log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
        loss = ClippedPolicyGradient(0.2, 0.28, bound)
        rows = loss.rows(StudentRows(now, None, None), step, torch.tensor([signal], dtype=torch.float64))
        (slope,) = torch.autograd.grad(rows.sum(), now)
        assert rows.item() == pytest.approx(expected, abs=1e-14)
        flat = clipped or expected != value
        assert slope.item() == (0.0 if flat else pytest.approx(-ratio * signal, abs=1e-14))


@pytest.mark.parametrize(("low", "high", "signal", "ratio", "value"), [
    (None, 0.2, -1.0, 0.1, 0.1), (None, 0.2, 1.0, 3.0, -1.2),  # open below
    (0.2, None, 1.0, 3.0, -3.0), (0.2, None, -1.0, 0.1, 0.8),  # open above
    (None, None, 1.0, 3.0, -3.0), (None, None, -1.0, 0.1, 0.1),  # importance sampling
])  # fmt: skip
def test_open_sides_by_hand(low, high, signal, ratio, value):
    now = torch.tensor([log(ratio) - 1.0], dtype=torch.float64)
    rows = ClippedPolicyGradient(low, high).rows(
        StudentRows(now, None, None),
        step_with(layout_of(1), student=[-1.0]),
        torch.tensor([signal], dtype=torch.float64),
    )
    assert rows.item() == pytest.approx(value, abs=1e-14)


def policy_step(old: Tensor, tokens: Tensor) -> Step:
    """A step whose student sampled with logits `old`."""
    axis = torch.arange(tokens.numel())
    sampled = old.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return Step(Layout(axis, axis, axis), tokens, {"student": Scores(sampled)})


def gradient_of(loss, p: Tensor, step: Step, signal: Tensor | None) -> Tensor:
    leaf = p.clone().requires_grad_(True)
    terms = [RowTerm(loss, step, signal, torch.ones(p.shape[0], dtype=p.dtype))]
    return torch.autograd.grad(objective(leaf, identity(p.shape[1]), terms)[0], leaf)[0]


@pytest.mark.parametrize("loss", [
    ClippedPolicyGradient(), ClippedPolicyGradient(0.2, 0.28, 3.0), ClippedPolicyGradient(None, None),
], ids=str)  # fmt: skip
def test_at_ratio_one_the_clipped_gradient_is_the_policy_gradient(loss):
    p, signal, tokens = logits(9, 7, seed=1), logits(9, seed=2), torch.arange(9) % 7
    step = policy_step(p, tokens)
    plain = gradient_of(PolicyGradient(), p, step, signal)
    assert (gradient_of(loss, p, step, signal) - plain).abs().max() < 1e-15
    leaf = step.views["student"].sampled.clone().requires_grad_(True)  # exactly 1: exactly equal
    exact = [torch.autograd.grad(x.rows(StudentRows(leaf, None, None), step, signal).sum(), leaf)[0]
             for x in (loss, PolicyGradient())]  # fmt: skip
    assert torch.equal(*exact)
    # the numbers of the sampling pass carry rounding of their own: the gradient follows it, and nothing is clipped
    noisy = replace(step, views={"student": Scores(step.views["student"].sampled + 1e-7)})
    assert (gradient_of(loss, p, noisy, signal) - plain).abs().max() < 1e-6


def test_a_clipped_token_has_no_gradient_and_an_open_one_the_importance_sampled():
    old, p = logits(40, 6, seed=3, scale=0.7), logits(40, 6, seed=4, scale=0.7)
    tokens, signal = torch.arange(40) % 6, logits(40, seed=5)
    step = policy_step(old, tokens)
    now = p.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    ratio = (now - step.views["student"].sampled).exp()
    beyond = torch.where(signal > 0, ratio > 1.28, (ratio < 0.8) | (ratio > 3.0))
    found = gradient_of(ClippedPolicyGradient(0.2, 0.28, 3.0), p, step, signal)
    plain = gradient_of(PolicyGradient(), p, step, signal)
    assert 5 < int(beyond.sum()) < 35 and not found[beyond].any()
    assert (found - ratio[:, None] * plain)[~beyond].abs().max() < 1e-14


def test_the_importance_sampled_surrogate_is_exact_off_policy():
    """E_old[r A grad log p] = grad E_p[A]."""
    old, p, reward = logits(7, seed=6), logits(7, seed=7), logits(7, seed=8)
    rows = old.expand(7, 7).contiguous(), p.expand(7, 7).contiguous()
    found = gradient_of(ClippedPolicyGradient(None, None), rows[1], policy_step(rows[0], torch.arange(7)), reward)
    leaf = p.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    assert ((old.softmax(-1)[:, None] * found).sum(0) - exact).abs().max() < 1e-14


def test_support_policy_gradient_clips_every_candidate_by_its_own_ratio():
    old = torch.tensor([[0.4, 0.2, 0.1]], dtype=torch.float64).log()
    now = (old + torch.tensor([[1.5, 0.5, 1.1]], dtype=torch.float64).log()).requires_grad_(True)
    signal = torch.tensor([[2.0, -1.0, -3.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2]])
    found = Candidates(ids, ids >= 0, old, old, None, torch.tensor([0.3], dtype=torch.float64).log())
    step = Step(layout_of(1), torch.tensor([0]), {"teacher": Scores(old[:, 0], candidates=found)})
    loss = SupportPolicyGradient(low=0.2, high=0.2, ratio=True)
    rows = loss.rows(StudentRows(None, now, None), step, signal)
    assert rows.item() == pytest.approx(-2.0 * 1.2 + 1.0 * 0.8 + 3.0 * 1.1, abs=1e-14)
    (slope,) = torch.autograd.grad(rows, now)
    assert slope.tolist()[0] == pytest.approx([0.0, 0.0, 3.3], abs=1e-14)
    assert slope[0, :2].tolist() == [0.0, 0.0]
    # at ratio 1 it is the plain form
    plain, at_one = SupportPolicyGradient(), old.clone().requires_grad_(True)
    slopes = [torch.autograd.grad(form.rows(StudentRows(None, at_one, None), step, signal), at_one)[0]
              for form in (plain, loss, SupportPolicyGradient(ratio=True))]  # fmt: skip
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[0], slopes[2])


def test_far_ratios_are_finite_in_float32():
    step = Step(layout_of(2), torch.zeros(2, dtype=torch.long), {"student": Scores(torch.tensor([-200.0, -0.1]))})
    now = torch.tensor([-0.1, -200.0], requires_grad=True)
    for signal in (torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])):
        rows = ClippedPolicyGradient(None, None).rows(StudentRows(now, None, None), step, signal)
        assert torch.isfinite(rows).all() and torch.isfinite(torch.autograd.grad(rows.sum(), now)[0]).all()


# Estimators on the sampled token

P, Q = logits(50, seed=11), logits(50, seed=12)


@pytest.mark.parametrize(("estimator", "kind", "factor"), [
    ("k2", "reverse_kl", 1.0), ("k3", "forward_kl", 1.0), ("abs", "total_variation", 2.0)
])  # fmt: skip
def test_expected_gradients_of_the_estimators(estimator, kind, factor):
    method = Method(name="m", views={"reference": View("teacher")}, terms=(Term(loss=SampledDivergence(estimator)),))
    leaf = P.clone().requires_grad_(True)
    value = divergence(leaf.log_softmax(-1)[None], Q.log_softmax(-1)[None], kind).sum()
    (exact,) = torch.autograd.grad(factor * value, leaf)
    assert (expected_gradient(method, P, Q) - exact).abs().max() < 1e-14
    assert expected_gradient(method, P, P).abs().max() < 1e-14


def test_expected_values_of_the_estimators():
    p, q = P.log_softmax(-1), Q.log_softmax(-1)
    step = Step(layout_of(50), torch.arange(50), {"reference": Scores(q)})
    mean = {name: (p.exp() * SampledDivergence(name).rows(StudentRows(p, None, None), step, None)).sum().item()
            for name in ("k2", "k3", "abs")}  # fmt: skip
    assert mean["k3"] == pytest.approx(divergence(p[None], q[None], "reverse_kl").item(), abs=1e-13)  # E[1/r - 1] = 0
    assert mean["k2"] == pytest.approx((p.exp() * (p - q) ** 2 / 2).sum().item(), abs=1e-13)
    assert mean["abs"] == pytest.approx((p.exp() * (p - q).abs()).sum().item(), abs=1e-13)


def test_the_estimators_by_hand():
    step = step_with(layout_of(3), reference=[-1.0, -2.0, -0.5])
    now = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64, requires_grad=True)
    expected = {
        "k2": ([0.125, 0.5, 0.0], [-0.5, 1.0, 0.0]),
        "k3": ([exp(0.5) - 1.5, exp(-1.0), 0.0], [1 - exp(0.5), 1 - exp(-1.0), 0.0]),
        "abs": ([0.5, 1.0, 0.0], [-1.0, 1.0, 0.0]),
    }
    for name, (values, slopes) in expected.items():
        rows = SampledDivergence(name).rows(StudentRows(now, None, None), step, None)
        assert rows.tolist() == pytest.approx(values, abs=1e-14)
        assert torch.autograd.grad(rows.sum(), now)[0].tolist() == pytest.approx(slopes, abs=1e-14)


def test_k3_is_finite_far_from_the_reference():
    step = Step(layout_of(1), torch.tensor([0]), {"reference": Scores(torch.tensor([-0.1]))})
    now = torch.tensor([-300.0], requires_grad=True)
    rows = SampledDivergence().rows(StudentRows(now, None, None), step, None)
    assert torch.isfinite(rows).all() and torch.isfinite(torch.autograd.grad(rows.sum(), now)[0]).all()


# Entropy


def test_entropy_needs_no_teacher_and_its_gradient_is_exact():
    method = Method(name="bonus", views={}, terms=(Term(loss=Entropy(), coef=0.5),))
    p = logits(4, 9, seed=13)
    loss, gradient = logit_gradient(method, p, make_step(method, p, p, torch.zeros(4, dtype=torch.long)))
    leaf = p.clone().requires_grad_(True)
    value = 0.5 * (leaf.softmax(-1) * leaf.log_softmax(-1)).sum(-1).mean()
    assert abs(loss - value) < 1e-14 and (gradient - torch.autograd.grad(value, leaf)[0]).abs().max() < 1e-14


def test_entropy_beside_a_teacher_over_the_whole_vocabulary():
    """c x (-H(p)) + KL(p, q) is one divergence: (1 + c) KL(p, q^(1 / (1 + c)) normalised) up to a constant."""
    terms = (Term(loss=Divergence()), Term(loss=Entropy(), coef=0.25))
    both = Method(name="m", views={"teacher": View("teacher", Full())}, terms=terms)
    tempered = Method(name="m", views={"teacher": View("teacher", Full())}, terms=(Term(loss=Divergence(), coef=1.25),))
    p, q, tokens = logits(6, 9, seed=14), logits(6, 9, seed=15), torch.zeros(6, dtype=torch.long)
    found = logit_gradient(both, p, make_step(both, p, q, tokens))[1]
    expected = logit_gradient(tempered, p, make_step(tempered, p, q / 1.25, tokens))[1]
    assert (found - expected).abs().max() < 1e-14


def test_a_uniform_student_has_most_entropy():
    value, gradient = Entropy().full(LogProbs(torch.full((1, 8), -log(8))), None)
    assert value.item() == pytest.approx(-log(8), abs=1e-6) and gradient.abs().max() < 1e-7


# Clamps by name


@pytest.mark.parametrize("support", [Full(), TopK(9)], ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "total_variation", "alpha", "skew_reverse_kl"])
def test_row_max_silences_the_rows_above_it(kind, support):
    p, q, tokens = logits(12, 9, seed=16), logits(12, 9, seed=17), torch.zeros(12, dtype=torch.long)
    open_loss = Divergence(kind)
    values = divergence(p.log_softmax(-1), q.log_softmax(-1), kind)
    limit = values.median().item() + 1e-9
    loss = Divergence(kind, row_max=limit)
    found, plain = (
        logit_gradient(m, p, make_step(m, p, q, tokens, top_k=9))
        for m in (Method(name="m", views={"teacher": View("teacher", support)}, terms=(Term(loss=x),))
                  for x in (loss, open_loss))
    )  # fmt: skip
    above = values > limit
    assert int(above.sum()) == 6
    assert found[0].item() == pytest.approx(values.clamp(max=limit).mean().item(), abs=1e-13)
    assert not found[1][above].any() and (found[1] - plain[1])[~above].abs().max() < 1e-15


def clipped_entries(kind: str, p: Tensor, q: Tensor, limit: float) -> Tensor:
    """sum_v min(l_v, limit), from the definitions on probabilities."""
    m = (p + q) / 2
    summands = {
        "reverse_kl": p * (p / q).log(),
        "forward_kl": q * (q / p).log(),
        "jsd": (q * (q / m).log() + p * (p / m).log()) / 2,
        "skew_forward_kl": q * (q / m).log(),
        "skew_reverse_kl": p * (p / m).log(),
        "total_variation": (p - q).abs() / 2,
        "alpha": 2 * (p.sqrt() - q.sqrt()).square(),
        "cross_entropy": -q * p.log(),
    }
    return summands[kind].clamp(max=limit).sum(-1)


@pytest.mark.parametrize("support", [Full(), TopK(9)], ids=str)
@pytest.mark.parametrize("kind", [
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha", "cross_entropy",
])  # fmt: skip
def test_entry_max_clips_every_summand(kind, support):
    p, q, tokens = logits(8, 9, seed=18), logits(8, 9, seed=19), torch.zeros(8, dtype=torch.long)
    leaf = p.clone().requires_grad_(True)
    value = clipped_entries(kind, leaf.softmax(-1), q.softmax(-1), 0.1).mean()
    (expected,) = torch.autograd.grad(value, leaf)
    loss = Divergence(kind, entry_max=0.1)
    method = Method(name="m", views={"teacher": View("teacher", support)}, terms=(Term(loss=loss),))
    found, gradient = logit_gradient(method, p, make_step(method, p, q, tokens, top_k=9))
    assert found.item() == pytest.approx(value.item(), abs=1e-13) and (gradient - expected).abs().max() < 1e-13
    plain = Method(name="m", views={"teacher": View("teacher", support)}, terms=(Term(loss=Divergence(kind)),))
    assert (logit_gradient(plain, p, make_step(plain, p, q, tokens, top_k=9))[1] - gradient).abs().max() > 1e-3


def test_signal_clamps_by_hand():
    step = step_with(layout_of(4), teacher=[-5.0, -1.0, -0.5, -2.0], student=[-1.0, -1.5, -3.0, -2.0])
    ratio = [-4.0, 0.5, 2.5, 0.0]
    assert log_ratio()(step).tolist() == ratio
    assert clamp(of=log_ratio(), low=-1.0, high=1.0)(step).tolist() == [-1.0, 0.5, 1.0, 0.0]
    assert floor(of=log_ratio(), low=-2.0)(step).tolist() == [-2.0, 0.5, 2.5, 0.0]
    # lam = .5: log(.5) / .5 = -2 log 2
    assert clip_low(of=log_ratio(), lam=0.5)(step).tolist() == pytest.approx([-2 * log(2), 0.5, 2.5, 0.0], abs=1e-15)
    for lam in (0.0, 1.0, -0.5):
        with pytest.raises(MethodError, match=r"clip_low\(lam=.*\): expected a number strictly between 0 and 1"):
            clip_low(of=log_ratio(), lam=lam)
    with pytest.raises(MethodError, match=r"clamp\(low=1.0, high=-1.0\): low must be below high"):
        clamp(of=log_ratio(), low=1.0, high=-1.0)


def test_a_scheduled_signal_follows_the_progress():
    step = step_with(layout_of(2), teacher=[-1.0, -3.0], student=[-2.0, -1.0])
    fading = scheduled(of=log_ratio(), schedule=Linear(1.0, 0.0, until=0.5))
    for progress, factor in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, 0.0)):
        assert fading(replace(step, progress=progress)).tolist() == [factor, -2.0 * factor]
    method = Method(name="m", views={"teacher": View("teacher")}, terms=(Term(signal=fading),))
    assert Method.from_dict(method.to_dict()) == method


# Future sums


@piece()
def given(step: Step, *, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS = given(values=(1.0, 2.0, 4.0, 10.0, 3.0, 5.0))
SEQUENCES = step_with(layout_of(3, 0, 1, 2), student=[0.0] * 6)  # the second sequence has no trained token


@pytest.mark.parametrize(("arguments", "expected"), [
    ({}, [7, 6, 4, 10, 8, 5]),
    ({"gamma": 0.5}, [3, 4, 4, 10, 5.5, 5]),
    ({"gamma": 0.0}, [1, 2, 4, 10, 3, 5]),
    ({"future_only": True}, [6, 4, 0, 0, 5, 0]),
    ({"gamma": 0.5, "future_only": True}, [2, 2, 0, 0, 2.5, 0]),
    ({"length_mean": True}, [7 / 3, 3, 4, 10, 4, 5]),
    ({"length_mean": True, "future_only": True}, [3, 4, 0, 0, 5, 0]),
    ({"gamma": 0.5, "length_mean": True}, [1, 2, 4, 10, 2.75, 5]),
])  # fmt: skip
def test_future_sums_by_hand(arguments, expected):
    assert discounted(of=REWARDS, **arguments)(SEQUENCES).tolist() == pytest.approx(expected, abs=1e-15)


def test_future_sums_of_long_sequences():
    layout = layout_of(1, 300, 0, 17, 64)
    rewards = logits(382, seed=20)
    step = Step(layout, torch.zeros(382, dtype=torch.long), {"student": Scores(rewards)})

    @piece()
    def reward(step: Step) -> Tensor:
        return step.views["student"].sampled

    for gamma in (0.97, 1.0):
        slow = rewards.clone()
        for i in reversed(range(381)):
            if layout.seq[i] == layout.seq[i + 1]:
                slow[i] += gamma * slow[i + 1]
        assert (discounted(of=reward(), gamma=gamma)(step) - slow).abs().max() < 1e-12
    assert (discounted(of=reward())(step) - layout.after(rewards)).abs().max() < 1e-12
    assert torch.equal(discounted(of=reward(), gamma=0.0)(step), rewards)


def test_future_sums_are_accumulated_in_float64():
    layout = layout_of(4096)
    step = Step(layout, torch.zeros(4096, dtype=torch.long), {"student": Scores(torch.full((4096,), 0.1))})
    found = discounted(of=log_of_student())(step)
    assert found.dtype == torch.float32
    assert found[0].item() == pytest.approx(4096 * float(torch.tensor(0.1)), rel=1e-7)


@piece()
def log_of_student(step: Step) -> Tensor:
    return step.views["student"].sampled


def test_no_tokens_have_no_future():
    empty = step_with(layout_of(0, 0), student=[], teacher=[])
    assert discounted(of=log_ratio(), gamma=0.5, future_only=True, length_mean=True)(empty).shape == (0,)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"gamma": 1.5}, r"discounted\(gamma=1.5\): expected a discount from 0"),
    ({"gamma": 0.0, "future_only": True}, r"discounted\(gamma=0\) is the signal itself"),
    ({"of": support_gap()}, r"discounted reads one number per token, but support_gap.* is \[N, K\]"),
])  # fmt: skip
def test_wrong_future_sums(arguments, message):
    with pytest.raises(MethodError, match=message):
        discounted(**{"of": log_ratio(), **arguments})


# Outcome baselines


def graded(reward: list[float], group: list[int]) -> Step:
    axis = torch.arange(len(reward))
    return Step(Layout(axis, axis, torch.tensor(group)), axis, {}, reward=torch.tensor(reward, dtype=torch.float64))


def test_leave_one_out_by_hand():
    step = graded([1.0, 0.0, 0.0, 1.0, 5.0, 2.0, 3.0], [0, 0, 0, 0, 1, 1, 2])
    third = 1 / 3
    found = outcome(std=False, baseline="leave_one_out")(step).tolist()
    assert found == pytest.approx([2 * third, -2 * third, -2 * third, 2 * third, 3.0, -3.0, 0.0], abs=1e-15)
    plain = outcome(std=False)(step)
    size = torch.tensor([4, 4, 4, 4, 2, 2, 2]).double()  # G / (G - 1) times the group mean's; a group of one stays 0
    assert found == pytest.approx((plain * size / (size - 1)).tolist(), abs=1e-15)
    assert outcome(std=False)(graded([3.0], [0])).tolist() == [0.0]
    both = outcome(baseline="leave_one_out", eps=0.0)(step)
    assert both[4].item() == pytest.approx(3.0 / 4.5**0.5, abs=1e-14)  # the variance of (5, 2) is 4.5


@pytest.mark.parametrize("group", [2, 3])
def test_leave_one_out_is_unbiased(group):
    vocab = 4
    p, reward = logits(vocab, seed=21), logits(vocab, seed=22)
    method = Method(name="rloo", views={}, terms=(Term(signal=outcome(std=False, baseline="leave_one_out")),))
    total = torch.zeros(vocab, dtype=torch.float64)
    for drawn in itertools.product(range(vocab), repeat=group):
        tokens = torch.tensor(drawn)
        layout = Layout(torch.arange(group), torch.arange(group), torch.zeros(group, dtype=torch.long))
        rows = p.expand(group, vocab).contiguous()
        step = make_step(method, rows, rows, tokens, layout=layout, reward=reward[tokens])
        total += p.softmax(-1)[tokens].prod() * logit_gradient(method, rows, step)[1].sum(0)
    leaf = p.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    assert (total - exact).abs().max() < 1e-12


# Importance weights: ratios (2, .5, 4 | .25, 3)

RATIOS = step_with(layout_of(3, 2, 0), student=[log(2), log(0.5), log(4), log(0.25), log(3)], behaviour=[0.0] * 5)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"cap": None}, [2, 0.5, 4, 0.25, 3]),
    ({}, [2, 0.5, 2, 0.25, 2]),
    ({"floor": 0.4}, [2, 0.5, 2, 0.4, 2]),
    ({"cap": 3.5, "how": "mask"}, [2, 0.5, 0, 0.25, 3]),
    ({"cap": 3.5, "floor": 0.4, "how": "mask"}, [2, 0.5, 0, 0, 3]),
    ({"cap": None, "floor": 0.4, "how": "mask"}, [2, 0.5, 4, 0, 3]),
    ({"level": "sequence", "cap": None}, [4, 4, 4, 0.75, 0.75]),
    ({"level": "sequence"}, [2, 2, 2, 0.75, 0.75]),
    ({"level": "sequence", "how": "mask"}, [0, 0, 0, 0.75, 0.75]),
    ({"level": "geometric", "cap": None}, [4 ** (1 / 3)] * 3 + [0.75**0.5] * 2),
    ({"level": "geometric", "cap": 1.2}, [1.2] * 3 + [0.75**0.5] * 2),
    ({"level": "geometric", "cap": 1.2, "floor": 0.9, "how": "mask"}, [0] * 5),
])  # fmt: skip
def test_importance_weights_by_hand(arguments, expected):
    assert importance(**arguments)(RATIOS).tolist() == pytest.approx(expected, abs=1e-14)


def test_one_sequence_does_not_change_the_weight_of_another():
    other = step_with(layout_of(3, 2, 0), student=[log(2), log(0.5), log(4), 1.0, -3.0], behaviour=[0.0] * 5)
    for level in ("token", "sequence", "geometric"):
        found, moved = (importance(level=level, cap=None)(step) for step in (RATIOS, other))
        assert torch.equal(found[:3], moved[:3]) and not torch.equal(found[3:], moved[3:])


def importance_method(**arguments) -> Method:
    return Method(name="m", views={}, terms=(Term(signal=outcome(std=False), weight=importance(**arguments)),))


def test_masked_tokens_leave_the_count_and_underflow_does_not():
    p = logits(4, 5, seed=23)
    tokens = torch.tensor([0, 1, 2, 3])
    method = importance_method(cap=2.0, how="mask")
    layout = Layout(torch.arange(4), torch.arange(4), torch.zeros(4, dtype=torch.long))
    step = make_step(method, p, p, tokens, layout=layout, reward=torch.tensor([1.0, 0.0, 0.0, 1.0]).double())
    sampled = step.views["student"].sampled
    views = {**step.views, "behaviour": Scores(sampled - torch.tensor([0.0, 5.0, 0.0, 0.0]).double())}
    loss, gradient = logit_gradient(method, p, replace(step, views=views))
    advantage = torch.tensor([0.5, 0.0, -0.5, 0.5]).double()  # the second token's ratio is e^5: masked
    assert loss.item() == pytest.approx((-(advantage * sampled).sum() / 3).item(), abs=1e-14)
    assert not gradient[1].any()
    tiny = step_with(layout_of(1), student=[-900.0], behaviour=[-1.0])
    assert importance(cap=2.0)(tiny).item() > 0


def test_importance_weights_make_another_samplers_tokens_unbiased():
    """Tokens from b, weighted p / b, have the policy gradient of p; the cap loses some of it."""
    p, b, reward = logits(7, seed=24), logits(7, seed=25), logits(7, seed=26)
    rows, tokens = p.expand(7, 7).contiguous(), torch.arange(7)
    leaf = p.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    step = policy_step(rows, tokens)
    step = replace(step, views={**step.views, "behaviour": Scores(b.log_softmax(-1))})
    for cap, worst in ((None, 1e-14), (1.0, None)):
        weight = importance(cap=cap)(step)
        found = gradient_of(PolicyGradient(), rows, step, reward * weight)
        gap = ((b.softmax(-1)[:, None] * found).sum(0) - exact).abs().max()
        assert gap < worst if worst else gap > 1e-3


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num": "behaviour"}, "the ratio of a policy to itself is 1"),
    ({"cap": -1.0}, r"importance\(floor=None, cap=-1.0\): expected 0 < floor < cap"),
    ({"floor": 3.0, "how": "mask"}, r"importance\(floor=3.0, cap=2.0\): expected 0 < floor < cap"),
    ({"cap": None, "how": "mask"}, r"masks outside \[floor, cap\]; give at least one"),
    ({"level": "prefix"}, r"importance.*level='prefix'.*: level must be one of token, sequence, geometric"),
])  # fmt: skip
def test_wrong_importance_weights(arguments, message):
    with pytest.raises(MethodError, match=message):
        importance(**arguments)


# Ranks, and what a method refuses when it is built


def test_pieces_know_their_rank():
    assert log_ratio().rank == ones().rank == outcome().rank == importance().rank == 1
    assert support_gap().rank == clamp(of=support_gap(), low=-1.0, high=1.0).rank == 2
    assert times(log_ratio(), support_gap()).rank == scale(2.0, support_gap()).rank == 2
    assert minus(log_ratio(), expected_log_ratio()).rank == times(confidence(), first_tokens(n=2)).rank == 1
    assert given(values=(1.0,)).rank is None  # a function of one's own need not declare it
    with pytest.raises(
        MethodError, match=r"cannot add signals of different shapes: log_ratio.* is \[N\], support_gap.*"
    ):
        plus(log_ratio(), support_gap())


def of_terms(*terms: Term, **parts) -> Method:
    return Method(name="m", **{"views": {"teacher": View("teacher", TopK(4))}, "terms": terms, **parts})


SHARES = {"policy": OnPolicy(0.5), "data": Dataset(0.5)}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: of_terms(Term(signal=support_gap())),
     r"signal support_gap.* is \[N, K\], one number per candidate, but PolicyGradient\(\) needs \[N\]"),
    (lambda: of_terms(Term(loss=SupportPolicyGradient(), signal=log_ratio())),
     r"signal log_ratio.* is \[N\], .* but SupportPolicyGradient\(\) needs \[N, K\]"),
    (lambda: of_terms(Term(loss=Divergence(), weight=support_gap())), r"weight support_gap.* but a weight needs \[N\]"),
    (lambda: of_terms(Term(loss=SampledDivergence(teacher="teacher"), on="data"), rollouts=SHARES),
     "SampledDivergence.* trains on 'data', which the student did not sample"),
    (lambda: of_terms(Term(loss=ClippedPolicyGradient(), signal=log_ratio(), on="data"), rollouts=SHARES),
     "ClippedPolicyGradient.* trains on 'data', which the student did not sample"),
    (lambda: of_terms(Term(loss=SampledDivergence(teacher="teacher")), rollouts={"policy": OnPolicy(1.0, "big", 0.2)}),
     "is sampled from a mixture with a teacher, and SampledDivergence.* only right with an importance weight"),
    (lambda: of_terms(Term(loss=Divergence(tail="raw")), views={"teacher": View("teacher", Full())}),
     "tail = 'raw' has no effect on view 'teacher', which has support Full"),
    (lambda: outcome(baseline="mean"), "outcome.*: baseline must be one of group_mean, leave_one_out"),
    (lambda: support_gap(by="both"), "support_gap.*: by must be one of student, teacher, uniform"),
])  # fmt: skip
def test_methods_that_cannot_be_right_are_refused(unchecked, make, message):
    with pytest.raises(MethodError, match=message):
        make()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ClippedPolicyGradient(low=1.0), "low = 1.0 must lie strictly between 0 and 1"),
    (lambda: ClippedPolicyGradient(high=0.0), "high = 0.0 must be positive"),
    (lambda: ClippedPolicyGradient(dual=1.0), "dual = 1.0 must be above 1"),
    (lambda: SupportPolicyGradient(low=0.2), "a clip has no effect without a ratio; set ratio=True"),
    (lambda: SampledDivergence("k1"), "'k1'.*: its gradient is the score, which does not contain the teacher; take k2"),
    (lambda: SampledDivergence("mse"), "estimator='mse'.*: expected k2, k3, abs"),
])  # fmt: skip
def test_losses_refuse_settings_without_effect(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_clipped_loss_asks_for_the_students_own_scores():
    """Old log-probs are needed as soon as the ratio is: the step must hold view "student"."""
    clipped = Method(name="m", views={}, terms=(Term(loss=ClippedPolicyGradient(), signal=outcome()),))
    plain = Method(name="m", views={}, terms=(Term(signal=outcome()),))
    assert clipped.reads_student("policy") and not plain.reads_student("policy")


def test_every_new_part_serialises():
    terms = (
        Term(loss=ClippedPolicyGradient(0.2, 0.28, 3.0), signal=discounted(of=clip_low(of=log_ratio(), lam=0.5), gamma=0.9)),
        Term(loss=SupportPolicyGradient(ratio=True, high=0.2), signal=support_gap(), weight=importance(cap=None)),
        Term(loss=Divergence("alpha", alpha=0.3, tail="raw", row_max=10.0, entry_max=0.5)),
        Term(loss=SampledDivergence("abs", "teacher"), weight=importance(level="geometric", floor=0.5, how="mask")),
        Term(loss=Entropy(), coef=Linear(0.01, 0.0)),
    )  # fmt: skip
    method = of_terms(*terms)
    assert Method.from_dict(method.to_dict()) == method
    assert "ClippedPolicyGradient(high=0.28, dual=3.0)" in str(method) and "Entropy()" in str(method)
    assert isinstance(terms[0].signal, Piece)
