"""One table of methods, one set of laws. A new method adds one line to TABLE.

Everything is float64 and exact: at one prefix with V = 50 tokens, the gradient of every token that the student could
have sampled is computed by the code that training runs, and averaged under the student.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from synthetic import expected_gradient, logit_gradient, logits, make_step

from opdkit.catalogue import build_method, method_names
from opdkit.losses import divergence
from opdkit.method import Method

V = 50


@dataclass(frozen=True)
class Case:
    method: str
    arguments: tuple[tuple[str, Any], ...] = ()
    exact: str | None = "reverse_kl"  # the divergence whose gradient it estimates without bias; None = biased
    zero_at_teacher: bool = True  # student = teacher gives zero gradient
    teacher: bool = True

    def build(self) -> Method:
        return build_method(self.method, dict(self.arguments))

    def __str__(self) -> str:
        return self.method + "".join(f"-{k}={v}" for k, v in self.arguments)


def case(
    method: str, *, exact: str | None = "reverse_kl", zero: bool = True, teacher: bool = True, **arguments: Any
) -> Case:
    return Case(method, tuple(arguments.items()), exact, zero, teacher)


TABLE = [
    case("opd"),
    case("vopd"),
    case("vopd", k=1),
    case("vopd", k=20),
    case("full_opd"),
    case("topk_opd", exact=None),
    *(case("topk_opd", exact=None, k=8, of=of, by=by)
      for of in ("student", "teacher", "union", "intersection", "difference") for by in ("student", "teacher", "uniform")),
    case("topk_opd", k=V),
    case("topk_kl", exact=None),
    case("topk_kl", exact=None, k=8, of="union"),
    case("topk_kl", exact=None, tail="renormalise"),
    case("topk_kl", k=V),
    case("topk_kl", k=V, tail="renormalise"),
    case("gkd", exact="jsd", on_policy_share=1.0),
    case("gkd", exact="jsd"),
    case("gkd", exact="forward_kl", mix=0.0, on_policy_share=1.0),
    case("gkd", mix=1.0, on_policy_share=1.0),
    case("grpo", exact=None, teacher=False),
    case("sft", exact=None, teacher=False, zero=False),
]  # fmt: skip
DISTILLING = [c for c in TABLE if c.teacher]
P = logits(V, seed=1)
Q = P + 0.5 * logits(V, seed=2)  # near enough for the top-8 lists to overlap
ROWS = logits(12, V, seed=3)
TEACHER = ROWS + 0.5 * logits(12, V, seed=4)


def exact_gradient(kind: str, p: torch.Tensor, q: torch.Tensor, mix: float = 0.5) -> torch.Tensor:
    leaf = p.clone().requires_grad_(True)
    value = divergence(leaf.log_softmax(-1)[None], q.log_softmax(-1)[None], kind, mix)
    return torch.autograd.grad(value.sum(), leaf)[0]


def one_step(c: Case, q: torch.Tensor, n: int = 12):
    p = ROWS[:n]
    tokens = torch.arange(n) * 3
    return p, make_step(c.build(), p, q, tokens, reward=(torch.arange(n) % 2).double())


def test_table_names_every_method():
    assert {c.method for c in TABLE} == set(method_names())


@pytest.mark.parametrize("c", TABLE, ids=str)
def test_value_prints_compares_and_serialises(c):
    method = c.build()
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method == c.build()
    assert str(method).startswith(f"{c.method}:\n") and "0x" not in str(method)


@pytest.mark.parametrize("c", [c for c in DISTILLING if c.exact], ids=str)
def test_unbiased_methods_have_the_exact_gradient(c):
    found = expected_gradient(c.build(), P, Q)
    assert (found - exact_gradient(c.exact, P, Q)).abs().max() < 1e-10


@pytest.mark.parametrize("c", [c for c in DISTILLING if not c.exact], ids=str)
def test_biased_methods_are_seen_to_be_biased(c):
    found = expected_gradient(c.build(), P, Q)
    assert (found - exact_gradient("reverse_kl", P, Q)).abs().max() > 1e-3


@pytest.mark.parametrize("c", [c for c in DISTILLING if c.zero_at_teacher], ids=str)
def test_no_gradient_when_student_is_teacher(c):
    p, step = one_step(c, ROWS)
    assert logit_gradient(c.build(), p, step)[1].abs().max() < 1e-14


@pytest.mark.parametrize("c", DISTILLING, ids=str)
def test_moving_the_teacher_moves_the_gradient(c):
    p, step = one_step(c, TEACHER)
    _, moved = one_step(c, TEACHER + 0.1 * logits(12, V, seed=5))
    assert (
        expected_gradient(c.build(), P, Q) - expected_gradient(c.build(), P, Q + 0.1 * logits(V, seed=6))
    ).abs().max() > 1e-4
    assert (logit_gradient(c.build(), p, step)[1] - logit_gradient(c.build(), p, moved)[1]).abs().max() > 1e-5


@pytest.mark.parametrize("c", TABLE, ids=str)
def test_chunks_of_any_size_are_exact(c):
    p, step = one_step(c, TEACHER)
    whole_loss, whole = logit_gradient(c.build(), p, step)
    for chunk in (1, 5, 100):
        loss, gradient = logit_gradient(c.build(), p, step, chunk)
        assert torch.isfinite(gradient).all() and (gradient - whole).abs().max() < 1e-15
        assert abs(loss - whole_loss) < 1e-14


@pytest.mark.parametrize("c", TABLE, ids=str)
def test_logit_gradients_sum_to_zero_at_every_position(c):
    p, step = one_step(c, TEACHER)
    assert logit_gradient(c.build(), p, step)[1].sum(-1).abs().max() < 1e-14
