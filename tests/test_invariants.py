"""One table of methods, one set of laws. A new method adds one line to TABLE.

Everything is float64 and exact: at one prefix with V = 50 tokens, the gradient of every token that the student could
have sampled is computed by the code that training runs, and averaged under the student. Responses are one token long and
every view has the same logits; the laws of longer responses and of several teachers are in each method's own file.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from synthetic import expected_gradient, logit_gradient, logits, make_step

from opdkit.catalogue import build_method, method_names
from opdkit.divergences import divergence
from opdkit.method import Method

V = 50


@dataclass(frozen=True)
class Case:
    method: str
    arguments: tuple[tuple[str, Any], ...]
    exact: tuple[str, float, float] | None  # kind, mix, alpha of the divergence whose gradient it has; None = biased
    zero_at_teacher: bool = True  # student = teacher gives zero gradient
    teacher: bool = True

    def build(self) -> Method:
        return build_method(self.method, dict(self.arguments))

    def __str__(self) -> str:
        return self.method + "".join(f"-{k}={v}" for k, v in self.arguments)


def case(
    method: str, *, exact: str | tuple[str, float, float] | None = "reverse_kl", zero: bool = True, teacher: bool = True,
    **arguments: Any,
) -> Case:  # fmt: skip
    kind = (exact, 0.5, 0.5) if isinstance(exact, str) else exact
    return Case(method, tuple(arguments.items()), kind, zero, teacher)


KINDS = ["forward_kl", "jsd", "total_variation", "cross_entropy", "skew_forward_kl", "skew_reverse_kl", "alpha"]
TABLE = [
    case("opd"),
    case("opd", discount=0.5),
    case("opd", low=0.2, high=0.28, dual=3.0),
    case("vopd"),
    case("vopd", k=1),
    case("vopd", k=20),
    case("vopd", k=20, high=0.2),
    case("full_opd"),
    *(case("full_opd", exact=kind, kind=kind) for kind in KINDS),
    case("full_opd", exact=("alpha", 0.5, 0.3), kind="alpha", alpha=0.3),
    case("sampled_kl", exact="forward_kl"),
    case("sampled_kl", estimator="k2"),
    case("sampled_kl", exact=None, estimator="abs"),
    case("topk_opd", exact=None),
    *(case("topk_opd", exact=None, k=8, of=of, by=by)
      for of in ("student", "teacher", "union", "intersection", "difference") for by in ("student", "teacher", "uniform")),
    case("topk_opd", k=V),
    case("topk_opd", k=V, low=0.2, high=0.2),
    case("topk_kl", exact=None),
    case("topk_kl", exact=None, k=8, of="union"),
    case("topk_kl", exact=None, k=8, of="teacher", kind="forward_kl", tail="raw", zero=False),
    case("topk_kl", exact=None, tail="renormalise"),
    case("topk_kl", exact=None, row_max=1.0),
    case("topk_kl", k=V),
    case("topk_kl", k=V, tail="renormalise"),
    *(case("topk_kl", exact=kind, k=V, kind=kind, tail="raw") for kind in KINDS),
    case("gkd", exact="jsd", on_policy_share=1.0),
    case("gkd", exact="jsd"),
    case("gkd", exact="forward_kl", mix=0.0, on_policy_share=1.0),
    case("gkd", mix=1.0, on_policy_share=1.0),
    case("gopd"),
    case("gopd", lam=1.0, importance_cap=None),
    case("gopd", lam=0.5, lam_end=1.5, until=0.3),
    case("listopd"),
    case("listopd", exact=None, ratio="teacher"),
    case("minillm"),
    case("minillm", mix=0.0, length_norm=False),
    case("minillm", level="sequence", importance_cap=3.0),
    case("distillm", exact=("skew_forward_kl", 0.1, 0.5)),
    case("distillm", exact=("skew_reverse_kl", 0.9, 0.5), kind="skew_reverse_kl", replay_share=0.0),
    case("distillm", exact=("skew_forward_kl", 0.3, 0.5), skew=0.3, on_policy_share=0.6, replay_share=0.4),
    case("effopd"),
    case("compose"),
    case("compose", base={"name": "vopd", "k": 20}, weight="2 * confidence()", exact=None),
    case("grpo_opd"),
    case("grpo_opd", how="terms"),
    case("uni_opd"),
    case("uni_opd", margin="mask", low=None, high=None),
    case("uni_opd", margin="none", balance=None, log_ratio_limit=None),
    case("grpo", exact=None, teacher=False),
    case("grpo", exact=None, teacher=False, baseline="leave_one_out", std=False, low=None, high=0.28, dual=3.0),
    case("grpo", exact=None, teacher=False, zero=False, entropy_coef=0.01),
    case("grpo", exact="forward_kl", kl_coef=1.0),
    case("grpo", exact="reverse_kl", kl_coef=1.0, kl="k2"),
    case("opsd", exact="forward_kl"),
    case("opsd", exact="jsd", kind="jsd"),
    case("opsd", exact=None, kind="jsd", k=8),
    case("sdpo", exact=None, k=16),
    case("sdpo", k=V, kind="reverse_kl"),
    case("sdft", exact=None, k=16),
    case("sdft", exact="jsd", k=V),
    case("antisd", exact=None, gate=False),
    case("antisd", gate=False, form="sd", lam=1.0),
    case("prune_opd", exact=None),
    case("prune_opd", exact=None, k=8, event="accept", accept=0.8, drop=1.0, base=0.1, adapt=False),
    case("prune_opd", k=V, base=0.0, stop_every=4),
    case("sod"),
    case("sod", how="terms", cap=None, floor=0.1, overlong=4),
    case("grpo", exact=None, teacher=False, std="population", overlong=4),
    case("sft", exact=None, teacher=False, zero=False),
    case("seqkd", exact=None, teacher=False, zero=False),
]  # fmt: skip
DISTILLING = [c for c in TABLE if c.teacher]
P = logits(V, seed=1)
Q = P + 0.5 * logits(V, seed=2)  # near enough for the top-8 lists to overlap
ROWS = logits(12, V, seed=3)
TEACHER = ROWS + 0.5 * logits(12, V, seed=4)


def exact_gradient(p: torch.Tensor, q: torch.Tensor, kind: str, mix: float = 0.5, alpha: float = 0.5) -> torch.Tensor:
    leaf = p.clone().requires_grad_(True)
    value = divergence(leaf.log_softmax(-1)[None], q.log_softmax(-1)[None], kind, mix, alpha)
    return torch.autograd.grad(value.sum(), leaf)[0]


def mean_gradient(c: Case, q: torch.Tensor) -> torch.Tensor:
    """Its exact mean over the student's tokens. All rewards are equal, so an outcome has no share in it."""
    reward = torch.ones(V, dtype=torch.float64)
    return expected_gradient(c.build(), P, q, reward=reward, correct=reward > 0)


def one_step(c: Case, q: torch.Tensor, n: int = 12):
    p = ROWS[:n]
    tokens = torch.arange(n) * 3
    reward = (torch.arange(n) % 2).double()
    return p, make_step(c.build(), p, q, tokens, reward=reward, correct=reward > 0)


def test_table_names_every_method():
    assert {c.method for c in TABLE} == set(method_names())


@pytest.mark.parametrize("c", TABLE, ids=str)
def test_value_prints_compares_and_serialises(c):
    method = c.build()
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method == c.build()
    assert str(method).startswith(f"{c.method}:\n") and "0x" not in str(method)


@pytest.mark.parametrize("c", [c for c in DISTILLING if c.exact], ids=str)
def test_unbiased_methods_have_the_exact_gradient(c):
    assert (mean_gradient(c, Q) - exact_gradient(P, Q, *c.exact)).abs().max() < 1e-10


@pytest.mark.parametrize("c", [c for c in DISTILLING if not c.exact], ids=str)
def test_biased_methods_are_seen_to_be_biased(c):
    kind = dict(c.arguments).get("kind", "reverse_kl")
    assert (mean_gradient(c, Q) - exact_gradient(P, Q, kind)).abs().max() > 1e-3


@pytest.mark.parametrize("c", [c for c in DISTILLING if c.zero_at_teacher], ids=str)
def test_no_gradient_when_student_is_teacher(c):
    p, step = one_step(c, ROWS)
    assert logit_gradient(c.build(), p, step)[1].abs().max() < 1e-14


@pytest.mark.parametrize("c", DISTILLING, ids=str)
def test_moving_the_teacher_moves_the_gradient(c):
    p, step = one_step(c, TEACHER)
    _, moved = one_step(c, TEACHER + 0.1 * logits(12, V, seed=5))
    assert (mean_gradient(c, Q) - mean_gradient(c, Q + 0.1 * logits(V, seed=6))).abs().max() > 1e-4
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
