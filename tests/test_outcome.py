"""The outcome signal: hand-computed advantages, and the exact expectation of its gradient by enumeration."""

import itertools

import pytest
import torch
from synthetic import logit_gradient, logits, make_step

from opdkit.catalogue import build_method
from opdkit.errors import RecipeError
from opdkit.signals import outcome
from opdkit.step import Layout


def step_with(reward: list[float], group: list[int]):
    n = len(reward)
    layout = Layout(torch.arange(n), torch.arange(n), torch.tensor(group))
    p = logits(n, 5, seed=1)
    method = build_method("grpo", {})
    return make_step(
        method, p, p, torch.zeros(n, dtype=torch.long), layout=layout, reward=torch.tensor(reward).double()
    )


def test_advantages_by_hand():
    step = step_with([1, 0, 0, 1, 5, 5], [0, 0, 0, 0, 1, 1])
    assert outcome(std=False)(step).tolist() == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0]
    # unbiased variance of (1, 0, 0, 1) is 4 x 0.25 / 3
    expected = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    torch.testing.assert_close(outcome()(step), torch.tensor([1, -1, -1, 1, 0, 0]).double() * expected)


def test_a_group_of_one_has_no_advantage():
    assert outcome()(step_with([3.0, 1.0], [0, 1])).tolist() == [0.0, 0.0]


def test_without_std_the_gradient_is_exact_up_to_the_known_factor():
    """A group mean that contains the sample itself shrinks the policy gradient by 1 - 1/G (2402.03300 has G = group)."""
    vocab, group = 7, 2
    p, reward = logits(vocab, seed=3), logits(vocab, seed=4)
    method = build_method("grpo", {"std": False})
    probs, total = p.softmax(-1), torch.zeros(vocab, dtype=torch.float64)
    for drawn in itertools.product(range(vocab), repeat=group):
        tokens = torch.tensor(drawn)
        layout = Layout(torch.arange(group), torch.arange(group), torch.zeros(group, dtype=torch.long))
        rows = p.expand(group, vocab).contiguous()
        step = make_step(method, rows, rows, tokens, layout=layout, reward=reward[tokens])
        total += probs[tokens].prod() * logit_gradient(method, rows, step)[1].sum(0)
    leaf = p.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    assert (total - (1 - 1 / group) * exact).abs().max() < 1e-12


def test_supervised_gradient_is_p_minus_one_hot():
    method = build_method("sft", {})
    p, tokens = logits(3, 6, seed=5), torch.tensor([4, 0, 2])
    _, gradient = logit_gradient(method, p, make_step(method, p, p, tokens))
    expected = (p.softmax(-1) - torch.nn.functional.one_hot(tokens, 6)) / 3
    assert (gradient - expected).abs().max() < 1e-15


def test_leave_one_out_has_the_exact_gradient():
    """RLOO's baseline does not contain the sample itself: no factor 1 - 1/G (2402.14740)."""
    vocab, group = 5, 2
    p, reward = logits(vocab, seed=3), logits(vocab, seed=4)
    method = build_method("grpo", {"std": False, "baseline": "leave_one_out"})
    probs, total = p.softmax(-1), torch.zeros(vocab, dtype=torch.float64)
    layout = Layout(torch.arange(group), torch.arange(group), torch.zeros(group, dtype=torch.long))
    rows = p.expand(group, vocab).contiguous()
    for drawn in itertools.product(range(vocab), repeat=group):
        tokens = torch.tensor(drawn)
        step = make_step(method, rows, rows, tokens, layout=layout, reward=reward[tokens])
        total += probs[tokens].prod() * logit_gradient(method, rows, step)[1].sum(0)
    leaf = p.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    assert (total - exact).abs().max() < 1e-12


def test_a_bonus_for_entropy_and_a_penalty_for_the_distance_to_the_reference():
    """Equal rewards: what is left is kl_coef x k3 of the sampled token, and - entropy_coef x the exact entropy."""
    p, b, tokens = logits(4, 6, seed=1), logits(4, 6, seed=2), torch.tensor([5, 0, 2, 2])
    method = build_method("grpo", {"kl_coef": 0.04, "entropy_coef": 0.01})
    step = make_step(method, p, b, tokens, reward=torch.ones(4).double())
    loss, gradient = logit_gradient(method, p, step)
    leaf = p.clone().requires_grad_(True)
    own, gap = leaf.log_softmax(-1), (b.log_softmax(-1) - leaf.log_softmax(-1)).gather(1, tokens[:, None])
    expected = 0.04 * (gap.exp() - 1 - gap).mean() + 0.01 * (own.exp() * own).sum(-1).mean()
    assert abs(loss - expected.detach()) < 1e-14
    assert (gradient - torch.autograd.grad(expected, leaf)[0]).abs().max() < 1e-14


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kl_coef": -0.1}, "kl_coef = -0.1 and entropy_coef = 0.0 must not be negative"),
    ({"kl": "k2"}, "kl = 'k2' and reference = 'reference' have no effect with kl_coef = 0"),
    ({"reference": "base"}, "reference = 'base' have no effect with kl_coef = 0"),
    ({"low": 1.5}, "low = 1.5 must lie strictly between 0 and 1"),
])  # fmt: skip
def test_settings_of_grpo_without_effect_or_sense_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=f"method grpo: .*{message}"):
        build_method("grpo", arguments)


def test_the_clip_acts_when_the_student_has_moved_and_not_before():
    """Advantages (+, -) and ratios 1.5 and 0.5: both have left the range in the direction of their advantage."""
    method = build_method("grpo", {"std": False})
    old = torch.tensor([[0.4, 0.6], [0.8, 0.2]], dtype=torch.float64).log()
    new = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=torch.float64).log()
    layout = Layout(torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.long))
    tokens = torch.zeros(2, dtype=torch.long)
    step = make_step(method, old, old, tokens, top_k=2, layout=layout, reward=torch.tensor([1.0, 0.0]).double())
    assert logit_gradient(method, old, step)[1].abs().min() > 0.04
    assert logit_gradient(method, new, step)[1].abs().max() == 0.0
    back = make_step(method, new, new, tokens, top_k=2, layout=layout, reward=torch.tensor([1.0, 0.0]).double())
    _, moved = logit_gradient(method, old, back)  # ratios 2/3 and 2: on the other sides, where nothing is clipped
    expected = (
        torch.tensor([[-0.5 * 2 / 3 * 0.6, 0.5 * 2 / 3 * 0.6], [0.5 * 2 * 0.2, -0.5 * 2 * 0.2]], dtype=torch.float64)
        / 2
    )
    assert (moved - expected).abs().max() < 1e-15


# ---------------------------------------------------------------------------------------------------------------------
# Outcome and distillation together


def both(current, old, teacher, reward):
    """Gradients of the two ways to combine, on one prompt with two responses of one token."""
    layout = Layout(torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.long))
    found = []
    for how in ("signal", "terms"):
        method = build_method("grpo_opd", {"how": how, "opd_coef": 2.0, "std": False})
        step = make_step(method, old, teacher, torch.zeros(2, dtype=torch.long), top_k=2, layout=layout, reward=reward)
        found.append(logit_gradient(method, current, step)[1])
    return found


def test_one_signal_and_two_terms_are_equal_at_ratio_one():
    old, teacher = logits(2, 5, seed=1), logits(2, 5, seed=2)
    one, two = both(old, old, teacher, torch.tensor([1.0, 0.0]).double())
    assert (one - two).abs().max() < 1e-15
    assert one.abs().max() > 0.1


def test_under_a_clip_one_signal_and_two_terms_differ():
    """Both tokens: ratio 1.5. Outcome advantage -.5 and +.5, log ratios d = log(q / .4), coefficient 2.

    Token 0: 2 d = +1.39, sum +.89 > 0: clipped, gradient 0. As terms: distillation clipped, outcome -.5 is not (there is
    no dual clip): .5 r grad log p / 2 tokens. Token 1: everything is positive, so both ways give 0.
    """
    old = torch.tensor([[0.4, 0.6], [0.4, 0.6]], dtype=torch.float64).log()
    new = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.8, 0.2], [0.8, 0.2]], dtype=torch.float64).log()
    one, two = both(new, old, teacher, torch.tensor([0.0, 1.0]).double())
    assert one.abs().max() == 0.0
    expected = torch.tensor([[0.5 * 1.5 * 0.4, -0.5 * 1.5 * 0.4], [0.0, 0.0]], dtype=torch.float64) / 2
    assert (two - expected).abs().max() < 1e-15


def test_distillation_without_a_coefficient_is_refused():
    with pytest.raises(RecipeError, match=r"method grpo_opd: opd_coef = 0.0 must be positive; without .* take grpo"):
        build_method("grpo_opd", {"opd_coef": 0.0})
