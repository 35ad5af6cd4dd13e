"""The outcome signal: hand-computed advantages, and the exact expectation of its gradient by enumeration."""

import itertools

import torch
from synthetic import logit_gradient, logits, make_step

from opdkit.catalogue import build_method
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
