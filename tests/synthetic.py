"""Steps with hand-chosen distributions: the head is the identity matrix, so hidden states are logits.

Gradients with respect to "hidden" are then gradients with respect to the student's logits, through the very code that
training runs.
"""

import torch
from torch import Tensor

from opdkit.head import Head, HeadRows, RowTerm, objective, score_rows
from opdkit.method import Method
from opdkit.step import Layout, Scores, Step
from opdkit.train.processes import Processes
from opdkit.train.update import coefficients, row_terms, streams
from opdkit.views.local import score_batch


def identity(vocab: int) -> Head:
    return Head(torch.eye(vocab, dtype=torch.float64))


def make_step(
    method: Method, p: Tensor, q: Tensor, tokens: Tensor, *, top_k: int = 4, layout: Layout | None = None, **fields
) -> Step:
    """A step whose student has logits p [N, V], every view logits q [N, V] and whose sampled tokens are given."""
    n, vocab = p.shape
    head = identity(vocab)
    top_k = max(top_k, method.top_list)
    k = max([top_k] + [getattr(v.support, "k", 0) for v in method.views.values()])
    got = score_rows(head, p.detach(), tokens, top_k=k)
    student = Scores(got.sampled, got.entropy, got.top_ids, got.top, None, HeadRows(p.detach(), head))
    layout = layout or Layout(torch.arange(n), torch.arange(n), torch.arange(n))
    step = Step(layout, tokens, {"student": student, "behaviour": Scores(got.sampled)}, **fields)
    views = {name: score_batch(head, q.detach(), step, view.support, top_k) for name, view in method.views.items()}
    return Step(layout, tokens, {**step.views, **views}, **fields)


def terms_of(method: Method, step: Step, index: Tensor | None = None, override=None) -> list[RowTerm]:
    """The terms of a whole update in which every term trains on the same step, restricted to some flat positions."""
    found = streams(method, {term.on: step for term in method.terms})
    part = {name: range(step.layout.sequences) for name in found}
    coefs = coefficients(found, dict.fromkeys(found, step), part, Processes(0, 1, torch.device("cpu")), override)
    return [t for name in found for t in row_terms(found[name], coefs[name], step, index)]


def logit_gradient(method: Method, p: Tensor, step: Step, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d p [N, V]) of a method on a step in which every term trains on the same step."""
    leaf = p.detach().clone().requires_grad_(True)
    terms = terms_of(method, step)
    loss, _ = objective(leaf, identity(p.shape[1]), terms, chunk)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def expected_gradient(method: Method, p: Tensor, q: Tensor, **options) -> Tensor:
    """The exact mean gradient [V] at one prefix, over every token that the student with logits p [V] could sample."""
    vocab = p.shape[0]
    tokens = torch.arange(vocab)
    rows = p.expand(vocab, vocab).contiguous()
    step = make_step(method, rows, q.expand(vocab, vocab).contiguous(), tokens, **options)
    _, gradient = logit_gradient(method, rows, step)
    return (p.softmax(-1)[:, None] * gradient).sum(0) * vocab  # the token mean divided by vocab rows


def logits(*shape: int, seed: int, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
