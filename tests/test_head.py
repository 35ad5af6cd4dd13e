"""The head against plain autograd on dense logits: values, gradients, precision, edge cases and memory."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from synthetic import logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opdkit import lm_head
from opdkit.head import Head, HeadRows, RowTerm, TableRows, objective, score_rows, tail_of
from opdkit.losses import (
    ClippedPolicyGradient,
    CrossEntropy,
    Divergence,
    Entropy,
    PolicyGradient,
    SampledDivergence,
    SupportPolicyGradient,
)
from opdkit.step import Candidates, Layout, Scores, Step

N, D, V, P = 7, 6, 11, 13  # rows, hidden, real vocabulary, rows of the head's weight
HIDDEN = logits(N, D, seed=1)
WEIGHT, BIAS = logits(P, D, seed=2), logits(P, seed=3)
TOKENS = torch.tensor([0, 3, 10, 3, 7, 1, 5])
COEF = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.25, 0.0, 1.5], dtype=torch.float64)
SIGNAL, GAPS = logits(N, seed=4), logits(N, 4, seed=5)
OLD = logits(N, seed=16, scale=0.5) - 2.5  # log-probs of the sampled tokens under an older policy
TEACHER = HeadRows(logits(N, 3, seed=6), Head(logits(V + 4, 3, seed=7), logits(V + 4, seed=8), V, softcap=4.0))
TABLE = TableRows(logits(N, V, seed=9).log_softmax(-1))
HEADS = {
    "plain": {},
    "padded": {"vocab": V, "scale": 0.5},
    "softcap": {"softcap": 2.0, "vocab": V},
    "everything": {"vocab": V, "scale": 1.5, "softcap": 3.0, "temperature": 0.7},
}


def candidates(ids: Tensor, valid: Tensor) -> Candidates:
    """Candidate ids with the log-probs of the table."""
    outside = torch.ones(N, V, dtype=torch.bool)
    for n, k in valid.nonzero().tolist():
        outside[n, ids[n, k]] = False
    tail = (TABLE.table.exp() * outside).sum(-1).clamp(min=1e-300).log()
    at = TABLE.table.gather(1, ids)
    return Candidates(ids, valid, at, at, None, tail)


def make_step() -> Step:
    """Views: `top` (all columns count), `union` (ids repeated in columns that do not count, one row with none that
    does), `all` (every id), `full` (lazy rows of another head) and `table`."""
    order = TABLE.table.argsort(-1, descending=True)
    repeated = torch.cat([order[:, :3], order[:, 1:2]], 1)
    valid = torch.tensor([True, True, True, False]).repeat(N, 1)
    valid[2, :2] = False
    valid[4] = False
    sets = {
        "top": candidates(order[:, :4], torch.ones(N, 4, dtype=torch.bool)),
        "union": candidates(repeated, valid),
        "all": candidates(order, torch.ones(N, V, dtype=torch.bool)),
    }
    views = {name: Scores(SIGNAL, candidates=c) for name, c in sets.items()}
    views |= {"full": Scores(SIGNAL, full=TEACHER), "table": Scores(SIGNAL, full=TABLE)}
    views |= {"student": Scores(OLD), "reference": Scores(OLD)}
    return Step(Layout(torch.arange(N), torch.arange(N), torch.arange(N)), TOKENS, views)


def to_float32(value):
    """The same nested dataclass with float32 in place of float64."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, dict):
        return {name: to_float32(item) for name, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: to_float32(getattr(value, f.name)) for f in fields(value)})
    return value


STEP = make_step()
STEP_32 = to_float32(STEP)
LOSSES = {
    "policy_gradient": (PolicyGradient(), SIGNAL),
    "clipped": (ClippedPolicyGradient(0.2, 0.28, 3.0), SIGNAL),
    "support_top": (SupportPolicyGradient("top"), GAPS),
    "support_union": (SupportPolicyGradient("union"), GAPS),
    "support_ratio": (SupportPolicyGradient("top", 0.2, 0.28, 3.0, ratio=True), GAPS),
    "cross_entropy": (CrossEntropy(), None),
    "k2": (SampledDivergence("k2"), None),
    "k3": (SampledDivergence("k3"), None),
    "abs": (SampledDivergence("abs"), None),
    "entropy": (Entropy(), None),
    "jsd_full_row_max": (Divergence("jsd", 0.3, teacher="full", row_max=0.3), None),
    "reverse_kl_full_entry_max": (Divergence(teacher="full", entry_max=0.05), None),
    "forward_kl_union_entry_max": (Divergence("forward_kl", teacher="union", entry_max=0.05), None),
}
KINDS = {
    "reverse_kl": Divergence(), "forward_kl": Divergence("forward_kl"), "jsd": Divergence("jsd", 0.3),
    "skew_forward_kl": Divergence("skew_forward_kl", 0.2), "skew_reverse_kl": Divergence("skew_reverse_kl", 0.8),
    "total_variation": Divergence("total_variation"), "alpha": Divergence("alpha", alpha=0.3),
    "divergence_cross_entropy": Divergence("cross_entropy"),
}  # fmt: skip
FIRST = ("reverse_kl", "forward_kl", "jsd")  # on every view and with every tail
for name, kind in KINDS.items():
    for view in ("full", "table") if name in FIRST else ("full",):
        LOSSES[f"{name}_{view}"] = (replace(kind, teacher=view), None)
    for view in ("top", "union", "all") if name in FIRST else ("union",):
        for how in ("bucket", "renormalise", "raw"):
            LOSSES[f"{name}_{view}_{how}"] = (replace(kind, teacher=view, tail=how), None)
MIXES = [
    ("reverse_kl_full", "jsd_full"),
    ("forward_kl_full", "reverse_kl_table"),
    ("policy_gradient", "cross_entropy"),
    ("reverse_kl_top_bucket", "jsd_union_bucket"),
    ("forward_kl_union_bucket", "support_top", "reverse_kl_top_renormalise"),
    ("policy_gradient", "reverse_kl_full", "forward_kl_top_bucket", "jsd_table", "support_union"),
    ("clipped", "entropy", "k3"),
    ("entropy", "skew_reverse_kl_full", "total_variation_union_raw"),
]
CASES = [(name,) for name in LOSSES] + MIXES
PLAIN_HEADS = ("padded", "everything")  # what is special about a head matters to few of the losses
HEAD_CASES = [(names, head) for names in CASES for head in HEADS if head in PLAIN_HEADS or names[0].startswith(FIRST)]


def terms_of(names: tuple[str, ...], dtype: torch.dtype = torch.float64) -> list[RowTerm]:
    """One term for each name; the coefficients differ between terms, and some are 0."""
    step = STEP if dtype == torch.float64 else STEP_32
    return [RowTerm(loss, step, None if signal is None else signal.to(dtype), COEF.roll(i).to(dtype) * (i + 1))
            for i, (loss, signal) in enumerate(LOSSES[name] for name in names)]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The same losses written from their definitions on dense log-probs


def dense(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)
    z = z[:, : head.size] * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.log_softmax(z / head.temperature, -1)


def dense_divergence(p: Tensor, q: Tensor, loss: Divergence) -> Tensor:
    def log_over(a: Tensor, b: Tensor) -> Tensor:
        return torch.special.xlogy(a, a) - torch.special.xlogy(a, b)

    m, a = loss.mix * q + (1 - loss.mix) * p, loss.alpha
    summands = {
        "reverse_kl": lambda: log_over(p, q),
        "forward_kl": lambda: log_over(q, p),
        "jsd": lambda: loss.mix * log_over(q, m) + (1 - loss.mix) * log_over(p, m),
        "skew_forward_kl": lambda: log_over(q, m),
        "skew_reverse_kl": lambda: log_over(p, m),
        "total_variation": lambda: (p - q).abs() / 2,
        "alpha": lambda: (a * q + (1 - a) * p - q**a * p ** (1 - a)) / (a * (1 - a)),
        "cross_entropy": lambda: -torch.special.xlogy(q, p),
    }[loss.kind]()
    row = (summands if loss.entry_max is None else summands.clamp(max=loss.entry_max)).sum(-1)
    return row if loss.row_max is None else row.clamp(max=loss.row_max)


def outcomes(p: Tensor, c: Candidates, n: int, tail: str) -> Tensor:
    """Probabilities of one row's valid candidates: renormalised, as they are, or with the rest (if any) as an outcome."""
    inside = c.ids[n][c.valid[n]].tolist()
    outside = [v for v in range(p.shape[1]) if v not in inside]
    if tail == "raw":
        return p[n, inside]
    if tail == "renormalise":
        return p[n, inside] / p[n, inside].sum()
    return torch.cat([p[n, inside], p[n, outside].sum()[None]]) if outside else p[n, inside]


def dense_clipped(logp: Tensor, old: Tensor, signal: Tensor) -> Tensor:
    """The clipped surrogate as PPO's and the dual clip's papers write it: bounds .8 and 1.28, dual 3."""
    ratio = (logp - old).exp()
    least = torch.minimum(ratio * signal, ratio.clamp(0.8, 1.28) * signal)
    return -torch.where(signal < 0, torch.maximum(least, 3.0 * signal), least)


def dense_rows(lp: Tensor, term: RowTerm) -> Tensor:
    loss, at_token = term.loss, lp.gather(1, TOKENS[:, None])[:, 0]
    if isinstance(loss, PolicyGradient):
        return -term.signal * at_token
    if isinstance(loss, ClippedPolicyGradient):
        return dense_clipped(at_token, OLD, term.signal)
    if isinstance(loss, CrossEntropy):
        return -at_token
    if isinstance(loss, Entropy):
        return (lp.exp() * lp).sum(-1)
    if isinstance(loss, SampledDivergence):
        gap = at_token - OLD
        return {"k2": gap.square() / 2, "k3": (-gap).exp() - 1 + gap, "abs": gap.abs()}[loss.estimator]
    view = STEP.views[loss.teacher]
    if isinstance(loss, SupportPolicyGradient):
        at = lp.gather(1, view.candidates.ids)
        return (dense_clipped(at, view.candidates.student, term.signal) if loss.ratio else -term.signal * at).sum(-1)
    if view.full is not None:
        q = TABLE.table if view.full is TABLE else dense(TEACHER.hidden, TEACHER.head)
        return dense_divergence(lp.exp(), q.exp(), loss)
    q = TABLE.table.exp()
    pairs = [[outcomes(p, view.candidates, n, loss.tail) for p in (lp.exp(), q)] for n in range(N)]
    return torch.stack([dense_divergence(ours, theirs, loss) for ours, theirs in pairs])


@dataclass
class Result:
    loss: Tensor
    rows: list[Tensor]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def leaves(options: dict, bias: bool) -> tuple[Tensor, Head]:
    """Hidden states and a head with gradients; the padded head has its bias and more rows than ids."""
    rows = P if "vocab" in options else V
    head = Head(
        WEIGHT[:rows].clone().requires_grad_(), BIAS[:rows].clone().requires_grad_() if bias else None, **options
    )
    return HIDDEN.clone().requires_grad_(), head


def solve(names: tuple[str, ...], options: dict, *, bias: bool, ours: bool, chunk: int | None = None) -> Result:
    hidden, head = leaves(options, bias)
    terms = terms_of(names)
    if ours:
        loss, rows = objective(hidden, head, terms, chunk)
    else:
        lp = dense(hidden, head)
        rows = [dense_rows(lp, term) for term in terms]
        loss = sum((term.coef * row).sum() for term, row in zip(terms, rows, strict=True))
    (3 * loss).backward()  # a gradient other than 1 reaches the head
    return Result(
        loss.detach(), [r.detach() for r in rows], hidden.grad, head.weight.grad, head.bias.grad if bias else None
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


@pytest.fixture
def small_blocks(monkeypatch):
    """Two rows in a block and four ids in a column block, so that every loop runs several times."""
    monkeypatch.setattr(lm_head, "BLOCK_ENTRIES", 2 * V)
    monkeypatch.setattr(lm_head, "COLUMN_ENTRIES", 4 * D)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize(("names", "head"), HEAD_CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_values_and_gradients_are_those_of_dense_autograd(names, head, small_blocks):
    options = HEADS[head]
    bias = options != {}
    expected = solve(names, options, bias=bias, ours=False)
    for chunk in (None, 3) if options != HEADS["everything"] else (None, 1, 3, 100):
        found = solve(names, options, bias=bias, ours=True, chunk=chunk)
        assert close(found.loss, expected.loss)
        assert all(close(a, b) for a, b in zip(found.rows, expected.rows, strict=True))
        assert close(found.hidden, expected.hidden) and close(found.weight, expected.weight)
        if bias:
            assert close(found.bias, expected.bias) and bool((found.bias[V:] == 0).all())
        assert bool((found.weight[V:] == 0).all())
        dead = sum(t.coef.abs() for t in terms_of(names)) == 0
        assert bool((found.hidden[dead] == 0).all())


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_gradcheck(names):
    options = HEADS["everything"]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return objective(hidden, Head(weight, bias, **options), terms_of(names), 3)[0]

    hidden, head = leaves(options, bias=True)
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias), fast_mode=True)


def test_hand_computed_reverse_kl():
    # p = (1/4, 3/4), q = (1/2, 1/2): a = log p/q = (-log 2, log 3/2), gradient p_j (a_j - KL) = +- 3/16 log 3
    p = (
        torch.tensor([[0.0, 3.0]], dtype=torch.float64).exp().log1p().log()
    )  # logits log 2, log(1 + e^3): replaced below
    p = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    q = TableRows(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    layout = Layout(*(torch.zeros(1, dtype=torch.long) for _ in range(3)))
    step = Step(layout, torch.zeros(1, dtype=torch.long), {"teacher": Scores(torch.zeros(1), full=q)})
    term = RowTerm(Divergence(), step, None, torch.ones(1, dtype=torch.float64))
    loss, (row,) = objective(p, Head(torch.eye(2, dtype=torch.float64)), [term])
    loss.backward()
    log = torch.tensor([2.0, 3.0], dtype=torch.float64).log()
    assert close(row, (0.75 * log[1] - log[0])[None]) and not row.requires_grad
    assert close(p.grad, torch.stack([-log[1], log[1]])[None] * 3 / 16)


def test_padding_rows_never_change_a_score_or_a_gradient():
    wild = WEIGHT.clone()
    wild[V:] = 1e4
    tame = solve(("reverse_kl_full", "forward_kl_top_bucket"), {"vocab": V}, bias=False, ours=True)
    hidden, head = HIDDEN.clone().requires_grad_(), Head(wild.requires_grad_(), None, V)
    loss, _ = objective(hidden, head, terms_of(("reverse_kl_full", "forward_kl_top_bucket")))
    (3 * loss).backward()
    assert torch.equal(loss, tame.loss) and torch.equal(hidden.grad, tame.hidden)
    assert torch.equal(head.weight.grad, tame.weight)
    a, b = (score_rows(Head(w, None, V), HIDDEN, TOKENS, top_k=V) for w in (wild.detach(), WEIGHT))
    assert torch.equal(a.log_norm, b.log_norm) and torch.equal(a.top_ids, b.top_ids) and int(a.top_ids.max()) < V


def test_every_id_a_candidate_equals_the_full_divergence():
    for kind in FIRST:
        full = solve((f"{kind}_table",), {}, bias=False, ours=True)
        for how in ("bucket", "renormalise", "raw"):  # the tail has no mass: finite, and nothing flows through it
            found = solve((f"{kind}_all_{how}",), {}, bias=False, ours=True)
            assert (
                close(found.loss, full.loss) and close(found.hidden, full.hidden) and close(found.weight, full.weight)
            )


def test_a_student_far_from_its_candidates_keeps_an_exact_gradient():
    # 40 nats between sampled token and the best id, tail mass 1e-9: float32 against float64
    z = torch.full((1, V), -20.0, dtype=torch.float64)
    z[0, 0], z[0, 1] = 0.0, -40.0
    order = torch.tensor([[0, 1, 2]])
    q = torch.full((1, 3), 0.25, dtype=torch.float64).log()
    c = Candidates(
        order, torch.ones(1, 3, dtype=torch.bool), q, q, None, torch.tensor([0.25], dtype=torch.float64).log()
    )
    grads = []
    for dtype in (torch.float64, torch.float32):
        low = Candidates(c.ids, c.valid, c.student.to(dtype), c.teacher.to(dtype), None, c.teacher_tail.to(dtype))
        step = Step(Layout(*(torch.zeros(1, dtype=torch.long),) * 3), torch.ones(1, dtype=torch.long),
                    {"teacher": Scores(torch.zeros(1), candidates=low)})  # fmt: skip
        terms = [
            RowTerm(loss, step, None, torch.ones(1, dtype=dtype)) for loss in (Divergence("forward_kl"), CrossEntropy())
        ]
        leaf = z.to(dtype).clone().requires_grad_()
        objective(leaf, Head(torch.eye(V, dtype=dtype)), terms)[0].backward()
        grads.append(leaf.grad.double())
    assert torch.isfinite(grads[1]).all() and (grads[0] - grads[1]).abs().max() < 1e-6


def test_a_tail_without_mass_is_a_constant():
    # everything outside the candidates underflows, yet the teacher has a quarter of its mass there: the value is
    # finite, and the candidates' gradient sums to 0 because there is nowhere to move mass to
    z = torch.full((1, V), -800.0, dtype=torch.float64)
    z[0, :2] = 0.0
    at, ids = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log(), torch.tensor([[0, 1]])
    found = Candidates(ids, ids >= 0, at, at, None, torch.tensor([0.25], dtype=torch.float64).log())
    step = Step(Layout(*(torch.zeros(1, dtype=torch.long),) * 3), torch.ones(1, dtype=torch.long),
                {"teacher": Scores(torch.zeros(1), candidates=found)})  # fmt: skip
    for kind, expected in (("forward_kl", [-0.125, 0.125]), ("reverse_kl", None)):
        leaf = z.clone().requires_grad_()
        term = RowTerm(Divergence(kind), step, None, torch.ones(1, dtype=torch.float64))
        loss, _ = objective(leaf, Head(torch.eye(V, dtype=torch.float64)), [term])
        loss.backward()
        assert torch.isfinite(loss) and not leaf.grad[0, 2:].any() and abs(leaf.grad.sum().item()) < 1e-15
        # forward_kl: p_k sum_j q_j - q_k over the two candidates = 3/8 - q_k
        assert expected is None or close(leaf.grad[0, :2], torch.tensor(expected, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# What is trained and what is not


class Recorder(TorchDispatchMode):
    """Shapes of every tensor that an operation makes (views are not made), and of those that are made empty."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []
        self.fresh: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for out in result if isinstance(result, tuple | list) else [result]:
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in taken:
                self.made.append(tuple(out.shape))
                self.fresh += [tuple(out.shape)] if "empty" in func.__name__ else []
        return result


ALL = ("policy_gradient", "reverse_kl_full", "forward_kl_top_bucket")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_what_is_trained_costs_work(trained, dtype, small_blocks):
    hidden, weight, bias = (t.clone().to(dtype).requires_grad_(want) for t, want in
                            zip((HIDDEN, WEIGHT, BIAS), trained, strict=True))  # fmt: skip
    terms = terms_of(ALL, torch.float64 if dtype == torch.float64 else torch.float32)
    with Recorder() as recorder:
        loss, _ = objective(hidden, Head(weight, bias, V), terms, 3)
        loss.backward()
    head_sized = [s for s in recorder.made if s in ((P, D), (V, D))]
    assert bool(head_sized) == trained[1]
    hidden_sized = [s for s in recorder.made if s == (N, D)]
    assert bool(hidden_sized) == trained[0]
    for tensor, want in zip((hidden, weight, bias), trained, strict=True):
        assert (tensor.grad is not None) == want


def test_parts_trained_alone_get_the_gradients_of_the_whole():
    whole = solve(ALL, HEADS["everything"], bias=True, ours=True)
    for part in ("hidden", "weight", "bias"):
        hidden, head = leaves(HEADS["everything"], bias=True)
        tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == part)
        (3 * objective(hidden, head, terms_of(ALL))[0]).backward()
        assert torch.equal(tensors[part].grad, getattr(whole, part))


def test_no_gradient_work_without_autograd():
    hidden, head = leaves({}, bias=False)
    expected, rows = objective(hidden, head, terms_of(ALL))
    with torch.no_grad(), Recorder() as recorder:
        loss, values = objective(hidden, head, terms_of(ALL))
    assert not loss.requires_grad and (V, D) not in recorder.made and (N, D) not in recorder.made
    assert torch.equal(loss, expected.detach()) and all(map(torch.equal, values, rows))


@pytest.mark.parametrize("names", CASES, ids="+".join)
def test_nothing_of_size_tokens_by_vocabulary_is_formed(names):
    hidden, head = leaves(HEADS["everything"], bias=True)
    with Recorder() as recorder:
        objective(hidden, head, terms_of(names), 2)[0].backward()
    every_id = any("_all_" in name for name in names)  # K = V here, so the candidates themselves are that large
    assert every_id or not [s for s in recorder.made if len(s) > 1 and s[0] * s[1] > 2 * V and s[1] >= V]


def test_one_graph_gives_the_same_gradient_again():
    hidden, head = leaves({}, bias=False)
    loss, _ = objective(hidden, head, terms_of(ALL))
    first = [g.clone() for g in torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)]
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert close(hidden.grad, 3 * first[0]) and close(head.weight.grad, 3 * first[1])
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes at the edge, precision, bad input


def test_no_rows_and_one_row():
    none, one = torch.arange(0), torch.arange(1)
    for index in (none, one):
        terms = [RowTerm(t.loss, STEP.rows(index), None if t.signal is None else t.signal[index], t.coef[index])
                 for t in terms_of(MIXES[-1])]  # fmt: skip
        hidden, head = leaves({"vocab": V}, bias=True)
        loss, rows = objective(hidden[index], head, terms)
        loss.backward()
        lp = dense(HIDDEN, Head(WEIGHT, BIAS, V))
        expected = sum((t.coef * dense_rows(lp, t))[index].sum() for t in terms_of(MIXES[-1]))
        assert close(loss.detach(), torch.as_tensor(expected, dtype=torch.float64)) and rows[0].shape == index.shape
        assert hidden.grad.shape == (N, D) and bool((hidden.grad[len(index) :] == 0).all())
        assert torch.isfinite(head.weight.grad).all() and (len(index) > 0 or not head.weight.grad.any())
        got = score_rows(head, HIDDEN[index], TOKENS[index], top_k=3, choose=lambda _, ids: (ids, ids >= 0))
        assert (
            got.top.shape == got.at_ids.shape == (len(index), 3) and got.tail.shape == got.entropy.shape == index.shape
        )


def test_no_terms_is_a_loss_of_zero():
    hidden, head = leaves({}, bias=False)
    loss, rows = objective(hidden, head, [])
    loss.backward()
    assert loss.item() == 0.0 and rows == [] and not hidden.grad.any() and not head.weight.grad.any()


@pytest.mark.parametrize("names", [*MIXES, ("cross_entropy",)], ids="+".join)
@pytest.mark.parametrize("head_type", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_low_precision_is_close_to_float64(names, low, head_type, small_blocks):
    options = HEADS["everything"]
    inputs = [HIDDEN.to(low), WEIGHT.to(head_type), BIAS.to(head_type)]
    results = []
    for exact in (False, True):
        hidden, weight, bias = ((t.double() if exact else t.clone()).requires_grad_() for t in inputs)
        terms = terms_of(names, torch.float64 if exact else torch.float32)
        loss, rows = objective(hidden, Head(weight, bias, **options), terms, 3)
        loss.backward()
        assert loss.dtype == rows[0].dtype == (torch.float64 if exact else torch.float32)
        assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype and bias.grad.dtype == bias.dtype
        results.append([t.detach().double() for t in (loss, hidden.grad, weight.grad, bias.grad)])
    tolerance = 2e-5 if low == head_type == torch.float32 else 2e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= tolerance * (expected.norm() + 0.1)


def test_autocast_sets_the_precision_of_the_products(small_blocks):
    terms = terms_of(("policy_gradient", "reverse_kl_table", "forward_kl_top_bucket"), torch.float32)
    low = [t.to(torch.bfloat16) for t in (HIDDEN, WEIGHT[:V])]
    plain, _ = objective(low[0], Head(low[1]), terms)
    hidden, weight = (t.float().requires_grad_() for t in low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective(hidden, Head(weight), terms)
        loss.backward()
        sampled = score_rows(Head(weight.detach()), hidden.detach(), TOKENS).sampled
    assert torch.equal(loss.detach(), plain) and hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(sampled, score_rows(Head(low[1]), low[0], TOKENS).sampled)


def test_bad_input_says_what_to_do():
    head = Head(WEIGHT[:V])
    with pytest.raises(ValueError, match="top_k = 12 exceeds the vocabulary of 11"):
        score_rows(head, HIDDEN, TOKENS, top_k=12)
    with pytest.raises(ValueError, match="vocab = 14, but the head has 13 rows"):
        Head(WEIGHT, vocab=14)
    with pytest.raises(ValueError, match="temperature 0"):
        head.at(0.0)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"chunk = {size} rows; expected at least 1"):
            objective(HIDDEN, head, terms_of(ALL), size)
    with pytest.raises(ValueError, match="view 'full' scores 11 token ids and the student 13"):
        objective(HIDDEN, Head(WEIGHT), terms_of(("reverse_kl_full",)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_scores_are_those_of_the_dense_distribution(options, chunk, small_blocks):
    head = Head(WEIGHT if "vocab" in options else WEIGHT[:V], BIAS if "vocab" in options else None, **options)
    chosen = STEP.views["union"].candidates
    lp = dense(HIDDEN, head)
    got = score_rows(
        head, HIDDEN, TOKENS, top_k=4, choose=lambda rows, _: (chosen.ids[rows], chosen.valid[rows]), chunk=chunk
    )
    assert close(got.sampled, lp.gather(1, TOKENS[:, None])[:, 0])
    assert close(got.log_norm, (head.logits(HIDDEN) - lp)[:, 0])
    assert close(got.entropy, -(lp.exp() * lp).sum(-1))
    expected = lp.topk(4)
    assert torch.equal(got.top_ids, expected.indices) and close(got.top, expected.values)
    assert torch.equal(got.ids, chosen.ids) and torch.equal(got.valid, chosen.valid)
    assert close(got.at_ids, lp.gather(1, chosen.ids))
    outside = [outcomes(lp.exp(), chosen, n, "bucket")[-1].log() for n in range(N)]
    assert close(got.tail, torch.stack(outside))
    assert close(HeadRows(HIDDEN, head).log_probs(slice(2, 5)), lp[2:5])
    assert close(HeadRows(HIDDEN, head).take(torch.tensor([4, 1])).log_probs(slice(None)), lp[[4, 1]])


def test_scores_that_are_not_asked_for_are_not_there():
    got = score_rows(Head(WEIGHT), HIDDEN, TOKENS, entropy=False)
    assert {name for name, value in vars(got).items() if value is None} == {
        "entropy",
        "top_ids",
        "top",
        "ids",
        "valid",
        "at_ids",
        "tail",
    }


def test_choose_reads_the_chunks_own_list():
    head = Head(WEIGHT, None, V)
    got = score_rows(
        head, HIDDEN, TOKENS, top_k=3, choose=lambda _, top: (top[:, :2], torch.ones_like(top[:, :2]).bool()), chunk=2
    )
    assert torch.equal(got.ids, got.top_ids[:, :2]) and torch.equal(got.at_ids, got.top[:, :2])
    assert close(got.tail, torch.log1p(-got.top[:, :2].exp().sum(-1)))


def test_a_tail_has_its_own_digits():
    # mass 2e-9 outside: 1 - sum is 0 in float32, the sum over the complement is not
    p = torch.tensor([[0.75, 0.25, 1e-9, 1e-9]], dtype=torch.float32)
    ids, valid = torch.tensor([[0, 1, 0]]), torch.tensor([[True, True, False]])
    assert float(tail_of(p.clone(), ids, valid)) == pytest.approx(float(torch.tensor(2e-9).log()), abs=1e-6)
    assert float(tail_of(p.clone(), ids, ~valid)) == pytest.approx(float(torch.tensor(0.25).log()), abs=1e-6)
    assert float(tail_of(p.clone(), torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4).bool())) == pytest.approx(
        float(torch.tensor(torch.finfo(torch.float32).tiny).log())
    )
    assert float(tail_of(p.clone(), ids, torch.zeros(1, 3).bool())) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# A low rank beside the weight (LoRA on the head)

R = 2
DOWN, UP = logits(R, D, seed=17), logits(P, R, seed=18)
LOW_RANK_CASES = [("cross_entropy",), ("reverse_kl_full", "entropy"), ("policy_gradient", "jsd_union_bucket", "k3")]


def low_rank_leaves(options: dict, names: tuple[str, ...] = ("hidden", "weight", "down", "up")) -> dict[str, Tensor]:
    rows = P if "vocab" in options else V
    found = {"hidden": HIDDEN, "weight": WEIGHT[:rows], "bias": BIAS[:rows], "down": DOWN, "up": UP[:rows]}
    return {name: t.clone().requires_grad_(name in names) for name, t in found.items()}


def low_rank_objective(t: dict[str, Tensor], options: dict, names: tuple[str, ...], chunk: int | None = None) -> Tensor:
    extended = torch.cat([t["hidden"], 0.5 * t["hidden"] @ t["down"].T], 1)
    head = Head(t["weight"], t["bias"], low_rank=t["up"], **options)
    return objective(extended, head, terms_of(names), chunk)[0]


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("names", LOW_RANK_CASES, ids="+".join)
def test_a_low_rank_is_the_dense_sum_of_the_weights(names, options, small_blocks):
    expected = low_rank_leaves(options)
    whole = Head(expected["weight"] + 0.5 * expected["up"] @ expected["down"], expected["bias"], **options)
    lp = dense(expected["hidden"], whole)
    loss = sum((term.coef * dense_rows(lp, term)).sum() for term in terms_of(names))
    (3 * loss).backward()
    for chunk in (None, 3):
        found = low_rank_leaves(options)
        ours = low_rank_objective(found, options, names, chunk)
        (3 * ours).backward()
        assert close(ours.detach(), loss.detach())
        assert all(close(found[name].grad, expected[name].grad) for name in ("hidden", "weight", "down", "up"))
        assert bool((found["up"].grad[V:] == 0).all())


def test_gradcheck_of_a_low_rank():
    options, names = HEADS["everything"], MIXES[-1]

    def loss(hidden: Tensor, low_rank: Tensor) -> Tensor:
        return objective(hidden, Head(WEIGHT, BIAS, low_rank=low_rank, **options), terms_of(names), 3)[0]

    hidden = torch.cat([HIDDEN, logits(N, R, seed=19)], 1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, UP.clone().requires_grad_()), fast_mode=True)


def test_a_frozen_weight_beside_a_trained_low_rank_costs_no_work():
    found = low_rank_leaves({}, ("up",))
    extended = torch.cat([HIDDEN, HIDDEN @ DOWN.T], 1)
    with Recorder() as recorder:
        objective(extended, Head(found["weight"], low_rank=found["up"]), terms_of(ALL), 3)[0].backward()
    assert (V, D) not in recorder.made and (N, D + R) not in recorder.made
    assert found["weight"].grad is None and found["up"].grad.shape == (V, R)


def test_scores_read_the_low_rank(small_blocks):
    extended = torch.cat([HIDDEN, HIDDEN @ DOWN.T], 1)
    head, whole = Head(WEIGHT, BIAS, V, low_rank=UP), Head(WEIGHT + UP @ DOWN, BIAS, V)
    lp = dense(HIDDEN, whole)
    for low, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.3)):
        mixed = Head(WEIGHT.to(low), BIAS.to(low), V, low_rank=UP.float() if low == torch.bfloat16 else UP.to(low))
        got = score_rows(mixed, extended.to(low), TOKENS, top_k=3, chunk=3)
        assert (got.sampled - lp.gather(1, TOKENS[:, None])[:, 0]).abs().max() < tolerance
        assert (HeadRows(extended.to(low), mixed).log_probs(slice(1, 4)) - lp[1:4]).abs().max() < tolerance
    assert close(score_rows(head.at(0.5), extended, TOKENS).sampled, score_rows(whole.at(0.5), HIDDEN, TOKENS).sampled)
    rows = HeadRows(extended, head).take(torch.tensor([4, 1]))
    assert close(rows.log_probs(slice(None)), lp[[4, 1]])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_a_low_rank_in_another_precision_is_close_to_float64(low, small_blocks):
    """A bfloat16 base with a float32 adapter, as LoRA keeps them."""
    results = []
    for exact in (False, True):
        extended = torch.cat([HIDDEN, HIDDEN @ DOWN.T], 1).to(low)
        hidden, weight, up = (t.double() if exact else t for t in (extended, WEIGHT.to(low), UP.float()))
        hidden, up = hidden.clone().requires_grad_(), up.clone().requires_grad_()
        terms = terms_of(("reverse_kl_full", "policy_gradient"), torch.float64 if exact else torch.float32)
        objective(hidden, Head(weight, None, V, low_rank=up), terms, 3)[0].backward()
        assert hidden.grad.dtype == hidden.dtype and up.grad.dtype == up.dtype
        results.append([hidden.grad.double(), up.grad.double()])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= (2e-5 if low == torch.float32 else 3e-2) * expected.norm()


def test_a_low_rank_that_does_not_fit_says_what_to_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(ValueError, match="the low rank has 11 rows and the weight 13; expected one per id"):
        Head(WEIGHT, low_rank=UP[:V])
    with pytest.raises(
        ValueError, match="the hidden states have 6 columns, but the head reads 8: 6 with its weight and 2"
    ):
        Head(WEIGHT, low_rank=UP).logits(HIDDEN)
    with pytest.raises(ValueError, match="the hidden states have 8 columns, but the head reads 6"):
        Head(WEIGHT).logits(torch.cat([HIDDEN, HIDDEN[:, :2]], 1))


# ---------------------------------------------------------------------------------------------------------------------
# Memory: every allocation of a child process is counted, those inside an operation too

MEMORY_V, MEMORY_D, CHUNK = 16384, 8, 16
MEMORY_LOSSES = {
    "sampled": (PolicyGradient(),),
    "top": (Divergence(),),
    "jsd": (Divergence("jsd", teacher="full"),),
    "entropy": (Entropy(),),
    "skew": (Divergence("skew_reverse_kl", teacher="full"),),
    "alpha": (Divergence("alpha", teacher="full", row_max=5.0),),
    "variation": (Divergence("total_variation", teacher="full"),),
    "clipped entries": (Divergence("skew_forward_kl", teacher="full", entry_max=0.5), Entropy()),
    "two full": (Divergence(teacher="full"), Divergence("forward_kl", teacher="full")),
}

HEAD_TRAINED = ("sampled", "top", "jsd", "two full")  # in both precisions; the others differ in their temporaries only


def peak_bytes(names: str, n: int, dtype: torch.dtype, train_head: bool) -> int:
    """Most bytes that forward and backward hold at once beyond their inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(n, MEMORY_D).to(dtype).requires_grad_()
    weight = torch.randn(MEMORY_V, MEMORY_D).to(dtype).requires_grad_(train_head)
    ids = torch.arange(4).repeat(n, 1)
    at = torch.full((n, 4), -3.0)
    found = Candidates(ids, ids >= 0, at, at, None, at[:, 0])
    views = {
        "teacher": Scores(at[:, 0], candidates=found),
        "full": Scores(at[:, 0], full=HeadRows(hidden.detach(), Head(weight.detach()))),
    }
    step = Step(Layout(*(torch.arange(n),) * 3), torch.zeros(n, dtype=torch.long), views)
    terms = [
        RowTerm(loss, step, torch.ones(n) if loss.signal_rank else None, torch.ones(n)) for loss in MEMORY_LOSSES[names]
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        objective(hidden, Head(weight), terms, CHUNK)[0].backward()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def measure_memory() -> None:
    """The child: prints one JSON list of [names, dtype, head trained, bytes at each number of rows]."""
    torch.set_num_threads(1)
    lm_head.BLOCK_ENTRIES, lm_head.COLUMN_ENTRIES = (
        MEMORY_V,
        MEMORY_V // 16 * MEMORY_D,
    )  # as small beside a chunk as in earnest
    for dtype in (torch.float32, torch.bfloat16):  # the first call of an operation may allocate tables that stay
        peak_bytes("jsd", 2 * CHUNK, dtype, True)
    found = []
    for names in MEMORY_LOSSES:
        settings = (torch.float32, False, (2, 4)), (torch.float32, True, (2,)), (torch.bfloat16, True, (2,))
        for dtype, train_head, sizes in settings[: 3 if names in HEAD_TRAINED else 1]:
            peaks = [peak_bytes(names, n * CHUNK, dtype, train_head) for n in sizes]
            found.append([names, str(dtype), train_head, peaks])
    print(json.dumps(found))


def test_memory_is_bounded_by_the_chunk_and_not_by_the_tokens():
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=True)
    logits_of_a_chunk = 4 * CHUNK * MEMORY_V
    for names, dtype, train_head, peaks in json.loads(child.stdout.splitlines()[-1]):
        size = 4 if dtype == "torch.float32" else 2
        models = 1.0 if names in ("sampled", "top", "entropy") else 1.5  # the student's logits, half of the teacher's
        small = 4 * MEMORY_V * (2 if names in ("sampled", "top") else 8)  # temporaries, each a block of one row
        head = (4 + size) * MEMORY_V * MEMORY_D if train_head else 0  # its gradient in float32, and in its own dtype
        assert peaks[0] <= models * logits_of_a_chunk + small + head, (names, dtype, train_head, peaks)
        # with the tokens grow their hidden gradient, and a loss of each term
        more = 2 * CHUNK if len(peaks) > 1 else 0
        assert peaks[-1] - peaks[0] <= more * (2 * size * MEMORY_D + 4 * 2), (names, dtype, train_head, peaks)


if __name__ == "__main__":
    measure_memory()
