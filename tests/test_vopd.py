"""Identities of vOPD (2605.07865) by exact enumeration, and its claims about variance as averages over many states.

float64. p is the student, q the teacher, r = log q - log p of a token, g = grad_z log p = e_y - p. Variance claims hold
on average over states, never state by state; only the optimal constant b* is never worse.
"""

from functools import cache
from math import log

import pytest
import torch
from synthetic import expected_gradient, identity, logit_gradient, logits, make_step, terms_of
from torch import Tensor

from opdkit.head import TableRows, objective
from opdkit.method import Method, Term, View
from opdkit.methods.full_opd import full_opd
from opdkit.methods.opd import opd
from opdkit.methods.topk_kl import topk_kl
from opdkit.methods.vopd import vopd
from opdkit.pieces import minus, scale
from opdkit.signals import log_ratio
from opdkit.step import Layout, Scores, Step
from opdkit.weights import ones

V = 20


@cache
def states(n: int = 2000, vocab: int = V, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random softmax pairs: student logits of sd 1.5, teacher logits sd `gap` away from them."""
    p = logits(n, vocab, seed=1)
    return p, p + logits(n, vocab, seed=2, scale=gap)


def dense(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities [n, V], rewards r [n, V], KL(p, q) [n] and ||g||^2 [n, V] of every token."""
    probs, r = p.softmax(-1), q.log_softmax(-1) - p.log_softmax(-1)
    norm = 1 - 2 * probs + probs.square().sum(-1, keepdim=True)
    return probs, r, -(probs * r).sum(-1), norm


def gradients(method: Method, p: Tensor, q: Tensor) -> Tensor:
    """[n, V, V]: the gradient of every token that could have been sampled, by the code that training runs."""
    n, vocab = p.shape
    rows, teacher = p.repeat_interleave(vocab, 0), q.repeat_interleave(vocab, 0)
    step = make_step(method, rows, teacher, torch.arange(vocab).repeat(n), top_k=1)
    return (logit_gradient(method, rows, step)[1] * (n * vocab)).reshape(n, vocab, vocab)


def variance(p: Tensor, g: Tensor) -> Tensor:
    """Total variance [n] over the sampled token of gradients [n, V, V]."""
    probs = p.softmax(-1)[:, :, None]
    return (probs * g.square()).sum((1, 2)) - (probs * g).sum(1).square().sum(-1)


def with_baseline(p: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """The same variance in closed form for the advantage r - b."""
    probs, r, kl, norm = dense(p, q)
    mean = probs * (-r - kl[:, None])
    return (probs * (r - b[:, None]).square() * norm).sum(-1) - mean.square().sum(-1)


def optimal(p: Tensor, q: Tensor) -> Tensor:
    probs, r, _, norm = dense(p, q)
    return (probs * r * norm).sum(-1) / (probs * norm).sum(-1)


def topk_kl_by_hand(p: Tensor, q: Tensor, k: int) -> Tensor:
    ids = p.topk(k).indices
    a, b = p.softmax(-1).gather(1, ids), q.softmax(-1).gather(1, ids)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return (a * (a / b).log()).sum(-1)


def advantages(method: Method, p: Tensor, q: Tensor) -> Tensor:
    """A [n, V] of every token."""
    n, vocab = p.shape
    rows, teacher = p.repeat_interleave(vocab, 0), q.repeat_interleave(vocab, 0)
    step = make_step(method, rows, teacher, torch.arange(vocab).repeat(n), top_k=1)
    signal = method.terms[0].signal
    assert signal is not None
    return signal(step).reshape(n, vocab)


# 1, 2, 3, 5: the baseline and its limits


def test_1_and_3_mean_and_variance_of_the_advantage():
    p, q = states(200)
    probs, r, kl, _ = dense(p, q)
    a = advantages(vopd(), p, q)
    assert (a - (r + kl[:, None])).abs().max() < 1e-13
    assert (probs * a).sum(-1).abs().max() < 1e-14
    plain = advantages(opd(), p, q)
    assert ((probs * plain).sum(-1) + kl).abs().max() < 1e-14
    second = (probs * plain.square()).sum(-1)
    assert ((probs * a.square()).sum(-1) - (second - kl.square())).abs().max() < 1e-13
    assert ((probs * a.square()).sum(-1) <= second).all()  # the advantage, unlike the gradient, is ordered everywhere


@pytest.mark.parametrize("b", [0.0, -0.7, 3.0])
def test_2_any_constant_baseline_leaves_the_expected_gradient(b):
    p, q = logits(V, seed=3), logits(V, seed=4)
    method = Method(
        name="constant", views={"teacher": View("teacher")}, terms=(Term(signal=minus(log_ratio(), scale(b, ones()))),)
    )
    probs, r, kl, _ = (x[0] for x in dense(p[None], q[None]))
    assert (expected_gradient(method, p, q) - probs * (-r - kl)).abs().max() < 1e-14
    a = (probs * (r - b))[:, None] * (torch.eye(V, dtype=p.dtype) - probs)
    assert (expected_gradient(method, p, q) + a.sum(0)).abs().max() < 1e-14


def test_5_limits():
    p, q = states(50)
    _, r, _, _ = dense(p, q)
    assert (advantages(vopd(k=V), p, q) - advantages(vopd(), p, q)).abs().max() < 1e-13
    assert (advantages(vopd(k=1), p, q) - r).abs().max() < 1e-14
    assert (gradients(vopd(k=1), p, q) - gradients(opd(), p, q)).abs().max() < 1e-13
    for method in (opd(), vopd(), vopd(k=5)):
        assert advantages(method, p, p).abs().max() < 1e-14


@pytest.mark.parametrize("k", [2, 5, 12])
def test_topk_baseline_renormalises_both_sides_and_leaves_the_reward_alone(k):
    p, q = states(100)
    _, r, _, _ = dense(p, q)
    assert (advantages(vopd(k=k), p, q) - (r + topk_kl_by_hand(p, q, k)[:, None])).abs().max() < 1e-13


# 4: gradient variance


def test_4_variance_falls_on_average_and_the_optimal_constant_is_never_worse():
    p, q = states()
    _, _, kl, _ = dense(p, q)
    plain, full = variance(p, gradients(opd(), p, q)), variance(p, gradients(vopd(), p, q))
    assert (full - with_baseline(p, q, -kl)).abs().max() < 1e-12
    best = with_baseline(p, q, optimal(p, q))
    assert (best <= plain + 1e-12).all() and (best <= full + 1e-12).all()
    assert full.mean() < 0.85 * plain.mean() and best.mean() < full.mean()
    assert 0.76 < (full < plain).double().mean() < 1.0  # lowered in most states, not in all


def test_4_a_state_where_the_baseline_hurts():
    """p = (.9, .1), q = (1/2, 1/2): r = (-.588, 1.609), V = E[r] = -.368, but b* = .1 r_1 + .9 r_2 = 1.390."""
    p, q = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log(), torch.zeros(1, 2, dtype=torch.float64)
    r1, r2 = log(0.5 / 0.9), log(0.5 / 0.1)
    assert optimal(p, q).item() == pytest.approx(0.1 * r1 + 0.9 * r2, abs=1e-13)
    plain, full = variance(p, gradients(opd(), p, q)).item(), variance(p, gradients(vopd(), p, q)).item()
    value = 0.9 * r1 + 0.1 * r2
    spread = 0.9 * 0.1 * 2  # two tokens: ||E||^2 = 2 (p_1 p_2 (r_1 - r_2))^2
    assert plain == pytest.approx(0.9 * r1**2 * 0.02 + 0.1 * r2**2 * 1.62 - spread * 0.09 * (r1 - r2) ** 2, abs=1e-13)
    assert full - plain == pytest.approx(value**2 * 0.18 - 2 * value * (0.9 * r1 * 0.02 + 0.1 * r2 * 1.62), abs=1e-13)
    assert full > plain


def test_4_variance_estimate_of_the_paper_is_right_on_average_only():
    """Eq. 11: the reduction is about KL^2 E||g||^2; exactly it is 2 V E[r ||g||^2] - V^2 E||g||^2 with V = -KL."""
    p, q = states()
    probs, r, kl, norm = dense(p, q)
    true = variance(p, gradients(opd(), p, q)) - variance(p, gradients(vopd(), p, q))
    exact = -2 * kl * (probs * r * norm).sum(-1) - kl.square() * (probs * norm).sum(-1)
    estimate = kl.square() * (probs * norm).sum(-1)
    assert (true - exact).abs().max() < 1e-12
    assert 0.85 < true.sum() / estimate.sum() < 0.97 and 0.05 < (true < 0).double().mean() < 0.15


# 6: top-k baselines and the full KL


@pytest.mark.parametrize("k", [1, 5, 12])
def test_6_decomposition_and_the_tail_bucket_as_a_lower_bound(k):
    p, q = states(200)
    _, _, kl, _ = dense(p, q)
    order = p.argsort(-1, descending=True)
    a, b = p.softmax(-1).gather(1, order), q.softmax(-1).gather(1, order)
    head_p, head_q = a[:, :k].sum(-1), b[:, :k].sum(-1)
    tail = [x[:, k:] / x[:, k:].sum(-1, keepdim=True) for x in (a, b)]
    kl_tail = (tail[0] * (tail[0] / tail[1]).log()).sum(-1)
    bernoulli = head_p * (head_p / head_q).log() + (1 - head_p) * ((1 - head_p) / (1 - head_q)).log()
    inner = topk_kl_by_hand(p, q, k)
    assert (kl - (head_p * inner + (1 - head_p) * kl_tail + bernoulli)).abs().max() < 1e-13
    found = {}
    for how in ("bucket", "renormalise"):
        method = topk_kl(k=k, tail=how)
        step = make_step(method, p, q, order[:, 0])
        terms = terms_of(method, step)
        found[how] = objective(p, identity(V), terms)[1][0]
    assert (found["bucket"] - (head_p * inner + bernoulli)).abs().max() < 1e-13
    assert (found["bucket"] <= kl + 1e-14).all()
    assert (found["renormalise"] - inner).abs().max() < 1e-13
    assert (inner < kl).any() and (k == 1 or (inner > kl).any())  # on either side


# 7 and 8: what carries gradient, and locality


def live_step(student: Tensor, teacher: Tensor, method: Method) -> Step:
    """A step whose recorded scores are still attached to the logits of both models."""
    tokens = torch.arange(student.shape[0])
    axis = torch.zeros_like(tokens)
    views = {}
    for name, z in (("student", student), ("teacher", teacher)):
        table = z.log_softmax(-1)
        views[name] = Scores(table[tokens, tokens], full=TableRows(table))
    return Step(Layout(axis, axis, axis[:1]), tokens, views)


def test_7_only_the_sampled_log_prob_carries_gradient():
    student, teacher = logits(5, V, seed=5).requires_grad_(True), logits(5, V, seed=6).requires_grad_(True)
    step = live_step(student, teacher, vopd())
    found = terms_of(vopd(), step)
    assert not found[0].signal.requires_grad and not found[0].coef.requires_grad
    hidden = student.detach().clone().requires_grad_(True)
    loss, _ = objective(hidden, identity(V), found)
    grads = torch.autograd.grad(loss, (hidden, student, teacher), allow_unused=True)
    assert grads[1] is None and grads[2] is None
    _, r, kl, _ = dense(student.detach(), teacher.detach())
    a = (r + kl[:, None]).diagonal()
    form = -a[:, None] * (torch.eye(V, dtype=a.dtype)[:5] - hidden.softmax(-1)) / 5
    assert (grads[0] - form).abs().max() < 1e-15


def test_8_the_advantage_is_that_of_discount_zero():
    """It reads its own position only: later tokens of the same sequence do not enter."""
    student, teacher = logits(5, V, seed=7), logits(5, V, seed=8)
    moved = teacher.clone()
    moved[3:] += logits(2, V, seed=9)
    before, after = (vopd().terms[0].signal(live_step(student, q, vopd())) for q in (teacher, moved))
    assert torch.equal(before[:3], after[:3]) and (before[3:] - after[3:]).abs().min() > 1e-3


# Statements of the paper's section on variance, on fixed students and teachers


def test_variance_order_over_two_thousand_prefixes():
    p, q = states()
    mean = {k: variance(p, gradients(vopd(k=k), p, q)).mean().item() for k in (None, 5, 10)}
    plain = variance(p, gradients(opd(), p, q)).mean().item()
    assert mean[None] < mean[10] < mean[5] < plain
    assert variance(p, gradients(full_opd(), p, q)).abs().max() < 1e-12  # no noise given the prefix


@pytest.mark.parametrize("method", [opd(), vopd(), vopd(k=1), vopd(k=5)], ids=str)
def test_mean_of_samples_converges_at_the_root_of_their_number(method):
    p, q = logits(1, V, seed=10), logits(1, V, seed=11)
    probs, r, kl, _ = dense(p, q)
    exact = (probs * (-r - kl[:, None]))[0]
    table = gradients(method, p, q)
    generator = torch.Generator().manual_seed(0)
    for n in (16, 1024):
        drawn = torch.multinomial(probs.expand(400, V), n, replacement=True, generator=generator)
        counts = torch.zeros(400, V, dtype=p.dtype).scatter_add_(1, drawn, torch.ones(400, n, dtype=p.dtype))
        error = (counts / n @ table[0] - exact).square().sum(-1).mean()
        assert error.item() == pytest.approx(variance(p, table).item() / n, rel=0.2)


def test_topk_loss_does_not_converge_to_the_full_gradient():
    p, q = logits(1, V, seed=10), logits(1, V, seed=11)
    probs, r, kl, _ = dense(p, q)
    found = gradients(topk_kl(k=5, tail="renormalise"), p, q)
    assert variance(p, found).item() < 1e-15  # nothing to average: what is left is bias
    assert (found[0, 0] - (probs * (-r - kl[:, None]))[0]).norm() > 0.05


def test_variance_reduction_grows_with_the_kl_and_vanishes_at_the_teacher():
    shares = []
    for gap in (0.03, 0.1, 0.3, 1.0, 2.0):
        p, q = states(500, V, gap)
        plain, full = variance(p, gradients(opd(), p, q)).mean(), variance(p, gradients(vopd(), p, q)).mean()
        shares.append((1 - full / plain).item())
    assert shares == sorted(shares) and shares[0] < 0.001 and shares[-1] > 0.3


@pytest.mark.parametrize(("vocab", "low", "high"), [(50, 0.10, 0.16), (200, 0.02, 0.04)])
def test_error_of_the_topk_baseline_falls_with_k(vocab, low, high):
    p, q = states(500, vocab)
    _, _, kl, _ = dense(p, q)
    ks = (1, vocab // 10, vocab // 4, vocab // 2, vocab)
    # The library's baseline: A - r at the most probable token
    step_tokens = p.argmax(-1)
    found = []
    for k in ks:
        step = make_step(vopd(k=k), p, q, step_tokens, top_k=1)
        found.append(vopd(k=k).terms[0].signal(step) - log_ratio()(step))
    errors = [((b - kl).square().mean() / kl.square().mean()).item() for b in found]
    assert errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(1.0) and errors[-1] < 1e-25
    assert low < errors[1] < high
    plain, full = with_baseline(p, q, torch.zeros_like(kl)).mean(), with_baseline(p, q, -kl).mean()
    assert 0.83 < (plain - with_baseline(p, q, -found[1]).mean()) / (plain - full) < 0.99


# The released vanilla comparator does not detach its advantage


def released_vanilla(p: Tensor, q: Tensor) -> Tensor:
    """Gradients [n, V, V] of - ratio A with A = log q - log p attached: the reward shifted by -1."""
    n, vocab = p.shape
    z = p.repeat_interleave(vocab, 0).requires_grad_(True)
    tokens = torch.arange(vocab).repeat(n)[:, None]
    logp = z.log_softmax(-1).gather(1, tokens)[:, 0]
    advantage = q.log_softmax(-1).repeat_interleave(vocab, 0).gather(1, tokens)[:, 0] - logp
    ratio = (logp - logp.detach()).exp()
    return torch.autograd.grad(-(ratio * advantage).sum(), z)[0].reshape(n, vocab, vocab)


def test_released_vanilla_is_unbiased_but_not_zero_at_the_teacher_and_ours_is():
    p, q = states(20)
    probs, r, kl, _ = dense(p, q)
    score = torch.eye(V, dtype=p.dtype) - probs[:, None, :]
    released, ours = released_vanilla(p, q), gradients(opd(), p, q)
    assert (released + (r - 1)[:, :, None] * score).abs().max() < 1e-13
    assert (ours + r[:, :, None] * score).abs().max() < 1e-13
    for found in (released, ours):
        assert ((probs[:, :, None] * found).sum(1) - probs * (-r - kl[:, None])).abs().max() < 1e-14
    assert (released_vanilla(p, p) - score).abs().max() < 1e-13  # noise that never dies out
    assert gradients(opd(), p, p).abs().max() < 1e-13


def test_the_fair_comparison_for_the_variance_is_the_detached_form():
    """One-token variance, V = 100: the released form makes the baseline look far better than it is near the teacher."""
    ratios = {}
    for gap in (1.0, 0.1):
        p = logits(40, 100, seed=12, scale=1.0)
        q = p + logits(40, 100, seed=13, scale=gap)
        plain, released = variance(p, gradients(opd(), p, q)).mean(), variance(p, released_vanilla(p, q)).mean()
        full = variance(p, gradients(vopd(), p, q)).mean()
        ratios[gap] = [(x / y).item() for x, y in ((released, plain), (full, released), (full, plain))]
    assert ratios[1.0] == pytest.approx([2.7, 0.30, 0.81], rel=0.1)
    assert ratios[0.1] == pytest.approx([116, 0.009, 0.998], rel=0.2)
