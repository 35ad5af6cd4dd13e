"""All responses of a toy, with the probability of each: exact expectations over whole responses.

Three tokens, of which 0 ends a response, and at most three tokens: 15 responses over 7 prefixes. A policy is a table of
logits [7, 3], one row a prefix. Expectations are taken of the gradients that training computes.
"""

import itertools

import torch
from synthetic import identity, make_step, terms_of
from torch import Tensor

from opdkit.head import objective
from opdkit.method import Method
from opdkit.step import Layout, Scores, Step

V, T = 3, 3
RESPONSES = [y for n in (1, 2, 3) for y in itertools.product(range(V), repeat=n)
             if 0 not in y[:-1] and (y[-1] == 0 or n == T)]  # fmt: skip
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
ROWS = torch.tensor([PREFIXES.index(y[:t]) for y in RESPONSES for t in range(len(y))])  # prefix of every token
TOKENS = torch.tensor([token for y in RESPONSES for token in y])
SEQ = torch.tensor([s for s, y in enumerate(RESPONSES) for _ in y])
LAYOUT = Layout(SEQ, SEQ, torch.zeros(len(RESPONSES), dtype=torch.long))


def log_probs(table: Tensor) -> Tensor:
    """log p of every response's tokens [N], by a table of logits."""
    return table.log_softmax(-1)[ROWS, TOKENS]


def whole(logp: Tensor) -> Tensor:
    """Sums over each response."""
    return logp.new_zeros(len(RESPONSES)).index_add(0, SEQ, logp)


def mixture(student: Tensor, teacher: Tensor, mix: float) -> Tensor:
    return (mix * teacher.softmax(-1) + (1 - mix) * student.softmax(-1)).log()


def tree_step(method: Method, student: Tensor, teacher: Tensor, sampler: Tensor, **fields) -> Step:
    """Every response once, as sampled by the policy `sampler`; all views but the student have the teacher's logits."""
    step = make_step(method, student[ROWS], teacher[ROWS], TOKENS, top_k=V, layout=LAYOUT, **fields)
    return Step(LAYOUT, TOKENS, {**step.views, "behaviour": Scores(log_probs(sampler))}, **fields)


def expected_tree_gradient(method: Method, student: Tensor, teacher: Tensor, sampler: Tensor, **fields) -> Tensor:
    """The mean gradient by the student's table [7, 3], over all responses of `sampler`, token losses summed."""
    step = tree_step(method, student, teacher, sampler, **fields)
    leaf = student[ROWS].clone().requires_grad_(True)
    loss, _ = objective(leaf, identity(V), terms_of(method, step, override="seq_mean_token_sum"))
    (rows,) = torch.autograd.grad(loss, leaf)
    chance = whole(log_probs(sampler)).exp() * len(RESPONSES)  # undo the mean over the listed responses
    return torch.zeros_like(student).index_add(0, ROWS, rows * chance[SEQ, None])


def gradient_of(value, student: Tensor) -> Tensor:
    leaf = student.clone().requires_grad_(True)
    return torch.autograd.grad(value(leaf), leaf)[0]


def response_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student, teacher) between distributions over whole responses."""
    ours, theirs = whole(log_probs(student)), whole(log_probs(teacher))
    return (ours.exp() * (ours - theirs)).sum()
