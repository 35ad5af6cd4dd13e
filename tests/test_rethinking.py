"""Identities of "Rethinking On-Policy Distillation" (2604.13016), each against dense formulas written out here.

float64, one prefix or a few. p is the student, q the teacher, l = log p - log q. Left out: what every method must
satisfy (unbiasedness, zero gradient at student = teacher), which tests/test_invariants.py holds.
"""

from math import log

import pytest
import torch
from synthetic import expected_gradient, identity, logit_gradient, logits, make_step, terms_of
from torch import Tensor

from opdkit.head import objective, score_rows
from opdkit.losses import PolicyGradient, SupportPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.methods.full_opd import full_opd
from opdkit.methods.opd import opd
from opdkit.methods.topk_kl import topk_kl
from opdkit.methods.topk_opd import topk_opd
from opdkit.metrics import agreement, averages
from opdkit.reduction import Reduction
from opdkit.report.read import Evaluation
from opdkit.report.results import gap_recovered
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import log_ratio, support_gap
from opdkit.step import Candidates, Layout, Scores, Step
from opdkit.support import Of, TopK
from opdkit.tasks.problem import Problem
from opdkit.views.batches import pad, trained_rows
from opdkit.weights import first_tokens

V = 20
P = logits(V, seed=1, scale=1.0)
Q = P + logits(V, seed=12)
SETS = ("student", "teacher", "union", "intersection", "difference")
BYS = ("student", "teacher", "uniform")


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of two probability vectors."""
    return (p * (p / q).log()).sum(-1)


def slope(function, z: Tensor) -> Tensor:
    """Central finite differences of a scalar function of logits [V]."""
    steps = 1e-6 * torch.eye(len(z), dtype=z.dtype)
    return torch.stack([(function(z + e) - function(z - e)) / 2e-6 for e in steps])


def gradient(method: Method, p: Tensor, q: Tensor, token: int = 0) -> Tensor:
    """Gradient [V] of one position through the code that training runs."""
    step = make_step(method, p[None], q[None], torch.tensor([token]))
    return logit_gradient(method, p[None], step)[1][0]


def score_function(p: Tensor) -> Tensor:
    """Row v is grad_z log p(v) = e_v - p."""
    return torch.eye(len(p), dtype=p.dtype) - p.softmax(-1)


def candidate_method(k: int, of: Of, by: str, raw: bool = False) -> Method:
    term = Term(loss=SupportPolicyGradient(), signal=support_gap(by=by, raw=raw))
    return Method(name="candidates", views={"teacher": View("teacher", TopK(k, of))}, terms=(term,))


def dense_scores(p: Tensor, q: Tensor, k: int) -> tuple[Scores, Scores]:
    token = torch.zeros(len(p), dtype=torch.long)
    s, t = (score_rows(identity(p.shape[1]), z, token, top_k=k) for z in (p, q))
    return Scores(s.sampled, s.entropy, s.top_ids, s.top), Scores(t.sampled, t.entropy, t.top_ids, t.top)


def test_1_expected_sampled_gradient_is_the_logit_form():
    p, gap = P.softmax(-1), P.log_softmax(-1) - Q.log_softmax(-1)
    form = p * (gap - kl(p, Q.softmax(-1)))
    assert (expected_gradient(opd(), P, Q) - form).abs().max() < 1e-14
    assert (gradient(full_opd(), P, Q) - form).abs().max() < 1e-14
    assert (slope(lambda z: kl(z.softmax(-1), Q.softmax(-1)), P) - form).abs().max() < 1e-9


def test_1_one_token_moves_along_its_own_score_function():
    gap = P.log_softmax(-1) - Q.log_softmax(-1)
    for token in (0, 7, V - 1):
        assert (gradient(opd(), P, Q, token) - gap[token] * score_function(P)[token]).abs().max() < 1e-15


def restricted(z: Tensor, ids: Tensor, what: str) -> Tensor:
    """Dense functions of the student's logits on fixed ids: log Z_p, Z_p, KL(p', q') and sum p (log p - log q)."""
    p, q = z.softmax(-1)[ids], Q.softmax(-1)[ids]
    mass = p.sum()
    return {"log_z": mass.log(), "z": mass, "kl": kl(p / mass, q / q.sum()), "sum": (p * (p / q).log()).sum()}[what]


@pytest.mark.parametrize("k", [1, 2, 5, 12, V])
def test_2_both_decompositions_of_the_released_topk_gradient(k):
    ids = P.topk(k).indices
    found = gradient(topk_opd(k=k), P, Q)
    z_p, z_q, inner = P.softmax(-1)[ids].sum(), Q.softmax(-1)[ids].sum(), restricted(P, ids, "kl")
    grad = {what: slope(lambda z, w=what: restricted(z, ids, w), P) for what in ("log_z", "z", "kl", "sum")}
    c = (z_p / z_q).log()
    assert (found - (grad["kl"] + (inner + c) * grad["log_z"])).abs().max() < 1e-8
    assert (found - (grad["sum"] - grad["z"]) / z_p).abs().max() < 1e-8
    advantages = topk_opd(k=k).terms[0].signal(make_step(topk_opd(k=k), P[None], Q[None], torch.tensor([0])))
    assert advantages.sum().item() == pytest.approx(-(inner + c).item(), abs=1e-14)


def test_2_renormalised_form_is_the_first_part_alone():
    ids = P.topk(5).indices
    found = gradient(topk_kl(k=5, tail="renormalise"), P, Q)
    assert (found - slope(lambda z: restricted(z, ids, "kl"), P)).abs().max() < 1e-9
    assert (found - gradient(topk_opd(k=5), P, Q)).abs().max() > 1e-2  # the released code computes another objective


def test_2_all_of_the_vocabulary_is_full_opd():
    q = Q.softmax(-1)
    value, form = kl(P.softmax(-1), q), slope(lambda z: kl(z.softmax(-1), q), P)
    for method in (topk_opd(k=V), topk_kl(k=V), topk_kl(k=V, tail="renormalise")):
        step = make_step(method, P[None], Q[None], torch.tensor([0]))
        loss, grad = logit_gradient(method, P[None], step)
        assert (grad[0] - form).abs().max() < 1e-9
        assert method.name == "topk_opd" or abs(loss - value) < 1e-13


def test_3_one_candidate():
    ids = P.topk(1).indices
    method = topk_kl(k=1, tail="renormalise")
    loss, grad = logit_gradient(method, P[None], make_step(method, P[None], Q[None], torch.tensor([0])))
    assert loss.item() == 0.0 and grad.abs().max() == 0.0
    gap = (P.log_softmax(-1) - Q.log_softmax(-1))[ids]
    assert (gradient(topk_opd(k=1), P, Q) - gap * score_function(P)[ids[0]]).abs().max() < 1e-15
    assert gap.abs() > 0.1  # so that the released form does train


def test_4_student_equal_to_teacher():
    rows = logits(6, V, seed=3)
    assert log_ratio()(make_step(opd(), rows, rows, torch.arange(6))).abs().max() == 0.0
    for of in SETS:
        for by in BYS:
            method = topk_opd(k=4, of=of, by=by)
            assert method.terms[0].signal(make_step(method, rows, rows, torch.arange(6))).abs().max() < 1e-15
    student, teacher = dense_scores(rows, rows, 4)
    found = averages(agreement(student, teacher, 4))
    assert found["overlap_ratio"] == 1.0 and found["overlap_token_advantage"] == pytest.approx(0.0, abs=1e-16)
    assert found["entropy_gap"] == found["reverse_kl"] == 0.0
    mass = rows.softmax(-1).topk(4).values.sum(-1).mean().item()
    assert found["overlap_mass_student"] == pytest.approx(mass) == found["overlap_mass_teacher"]


def test_5_metrics_by_hand():
    """Overlap {0} of top-2: ratio 1/2, advantage 0. Overlap {0, 1}: p' = (5/8, 3/8), q' = (1/4, 3/4). No overlap."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 3, dtype=torch.float64)
    q = torch.tensor([[0.4, 0.1, 0.45, 0.05], [0.2, 0.6, 0.12, 0.08], [0.05, 0.15, 0.3, 0.5]], dtype=torch.float64)
    found = averages(agreement(*dense_scores(p.log(), q.log(), 2), 2))
    inner = 0.625 * log(2.5) + 0.375 * log(0.5)  # .3127515 nats
    assert found["overlap_ratio"] == pytest.approx(0.5, abs=1e-15)
    # Averaged over the two positions that have an overlap, not pooled over their three (token, k) entries.
    assert found["overlap_token_advantage"] == pytest.approx(-inner / 2 / 2, abs=1e-14)
    assert found["overlap_mass_student"] == pytest.approx((0.5 + 0.8) / 3, abs=1e-14)
    assert found["overlap_mass_teacher"] == pytest.approx((0.4 + 0.8) / 3, abs=1e-14)
    entropy_p, entropy_q = -(p * p.log()).sum(-1), -(q * q.log()).sum(-1)
    assert found["entropy_gap"] == pytest.approx((entropy_q - entropy_p).abs().mean().item(), abs=1e-14)
    assert found["entropy_teacher"] == pytest.approx(entropy_q.mean().item(), abs=1e-14)
    assert found["reverse_kl"] == pytest.approx((log(0.5 / 0.4) + log(0.5 / 0.2) + log(0.5 / 0.05)) / 3, abs=1e-14)


def test_5_metrics_position_by_position():
    k = 5
    p, q = logits(40, V, seed=4), logits(40, V, seed=5)
    for row in range(40):
        found = averages(agreement(*dense_scores(p[row : row + 1], q[row : row + 1], k), k))
        both = sorted(dense_set("intersection", p[row], q[row], k))
        a, b = p[row].softmax(-1)[both], q[row].softmax(-1)[both]
        advantage = -kl(a / a.sum(), b / b.sum()).item() / len(both) if both else 0.0
        assert found["overlap_ratio"] == pytest.approx(len(both) / k, rel=1e-7)
        assert found["overlap_token_advantage"] == pytest.approx(advantage, abs=1e-13) and advantage <= 1e-16
        for name, mass, z in (("student", a.sum(), p[row]), ("teacher", b.sum(), q[row])):
            assert found[f"overlap_mass_{name}"] == pytest.approx(mass.item(), abs=1e-14)
            assert mass <= z.softmax(-1).topk(k).values.sum() + 1e-15 <= 1 + 2e-15


def dense_set(of: str, p: Tensor, q: Tensor, k: int = 6) -> set[int]:
    s, t = set(p.topk(k).indices.tolist()), set(q.topk(k).indices.tolist())
    return {"student": s, "teacher": t, "union": s | t, "intersection": s & t, "difference": s ^ t}[of]


def candidate_form(of: str, by: str, raw: bool) -> Tensor:
    """sum_k w_k (log p_k - log q_k) grad log p_k over the set, an id of both lists once."""
    ids = sorted(dense_set(of, P, Q))
    weight = {"student": P.softmax(-1), "teacher": Q.softmax(-1), "uniform": torch.ones(V, dtype=P.dtype)}[by][ids]
    weight = weight if raw else weight / weight.sum()
    gap = (P.log_softmax(-1) - Q.log_softmax(-1))[ids]
    return ((weight * gap)[:, None] * score_function(P)[ids]).sum(0)


@pytest.mark.parametrize("by", BYS)
def test_6_raw_weights_add_up_over_disjoint_sets_and_renormalised_ones_do_not(by):
    for raw in (True, False):
        parts = {of: gradient(candidate_method(6, of, by, raw), P, Q) for of in SETS}
        for of, found in parts.items():
            assert (found - candidate_form(of, by, raw)).abs().max() < 1e-14
        gap = (parts["intersection"] + parts["difference"] - parts["union"]).abs().max()
        assert gap < 1e-14 if raw else gap > 1e-2
    assert 0 < len(dense_set("intersection", P, Q)) < 6


@pytest.mark.parametrize("by", BYS)
def test_7_the_difference_alone_has_raw_weights_as_released(by):
    for of in SETS:
        form = candidate_form(of, by, raw=of == "difference")
        assert (gradient(topk_opd(k=6, of=of, by=by), P, Q) - form).abs().max() < 1e-14


@pytest.mark.parametrize("by", BYS)
def test_7_weights_sum_to_one_over_valid_candidates_or_to_nothing(by):
    student = logits(4, 5, seed=6).log_softmax(-1)
    valid = torch.tensor([[True] * 5, [True, False, True, False, True], [False] * 4 + [True], [False] * 5])
    nothing = torch.zeros(4, dtype=torch.float64)
    # log q - log p = 1 on every candidate, so that the signal is the weight
    found = Candidates(torch.arange(20).reshape(4, 5), valid, student, student + 1.0, None, nothing)
    axis = torch.arange(4)
    views = {"student": Scores(nothing), "teacher": Scores(nothing, candidates=found)}
    step = Step(Layout(axis, axis, axis), axis, views)
    weight = support_gap(by=by)(step)
    assert weight.sum(-1).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0], abs=1e-15)
    assert weight[~valid].abs().max() == 0.0 and (weight[valid] > 0).all()
    raw = support_gap(by=by, raw=True)(step)
    mass = {"student": student.exp(), "teacher": (student + 1).exp(), "uniform": torch.ones_like(student)}[by]
    assert (raw - mass * valid).abs().max() < 1e-15


def test_7_candidate_sets_are_python_sets():
    p, q = logits(30, V, seed=7), logits(30, V, seed=8)
    for of in SETS:
        method = topk_opd(k=6, of=of)
        c = make_step(method, p, q, torch.zeros(30, dtype=torch.long)).views["teacher"].candidates
        for row in range(30):
            want = dense_set(of, p[row], q[row])
            kept = c.ids[row][c.valid[row]].tolist()
            assert len(kept) == len(set(kept)) and set(kept) == want
            for side, z, tail in (("student", p, c.student_tail), ("teacher", q, c.teacher_tail)):
                probs = z[row].softmax(-1)
                assert (getattr(c, side)[row] - probs[c.ids[row]].log()).abs().max() < 1e-13
                outside = sum(probs[v].item() for v in range(V) if v not in want)
                assert tail is None or tail[row].exp().item() == pytest.approx(outside, abs=1e-14)


def test_8_clipped_surrogates_have_the_same_gradient_on_policy():
    """PPO's clip of .2 and the dual clip of 3 are inert with one update per rollout batch: the ratio is 1."""
    z = P.clone().requires_grad_(True)
    ratio = (z.log_softmax(-1) - P.log_softmax(-1)).clamp(-20, 20).exp()
    advantage = -P.softmax(-1) * (P.log_softmax(-1) - Q.log_softmax(-1))
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    dual = torch.where(advantage < 0, torch.minimum(-advantage * 3.0, clipped), clipped)
    for surrogate in (-advantage * ratio, clipped, dual):
        (found,) = torch.autograd.grad(surrogate.sum(), z, retain_graph=True)
        assert (gradient(topk_opd(k=V), P, Q) - found).abs().max() < 1e-14


SEQ = torch.tensor([0] * 5 + [1] * 1 + [2] * 3)
LAYOUT = Layout(SEQ, SEQ, torch.arange(3))
ROWS, TEACHER = logits(9, V, seed=9), logits(9, V, seed=10)
TOKENS = torch.arange(9)
REDUCTIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def weighted(reduction: Reduction) -> Method:
    """Sampled and top-k terms with different weights, so that their counted tokens differ."""
    view = {"teacher": View("teacher", TopK(4, "union"))}
    first = Term(loss=PolicyGradient(), signal=log_ratio(), weight=first_tokens(n=2), reduction=reduction)
    second = Term(loss=SupportPolicyGradient(), signal=support_gap(), coef=0.3, reduction=reduction)
    return Method(name="weighted", views=view, terms=(first, second))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_8_tokens_of_weight_zero_contribute_nothing_and_change_nothing(reduction):
    term = Term(signal=log_ratio(), weight=first_tokens(n=2), reduction=reduction)
    method = Method(name="prefix", views={"teacher": View("teacher")}, terms=(term,))
    _, found = logit_gradient(method, ROWS, make_step(method, ROWS, TEACHER, TOKENS, layout=LAYOUT, horizon=7))
    kept = torch.tensor([0, 1, 5, 6, 7])
    dropped = torch.tensor([2, 3, 4, 8])
    assert found[dropped].abs().max() == 0.0
    short = make_step(method, ROWS[kept], TEACHER[kept], TOKENS[kept], horizon=7,
                      layout=Layout(SEQ[kept], SEQ[kept], torch.arange(3)))  # fmt: skip
    assert (logit_gradient(method, ROWS[kept], short)[1] - found[kept]).abs().max() < 1e-15


def test_8_untrained_and_padded_positions_are_not_on_the_axis():
    problem = Problem(id="0", prompt="?")
    tool = Rollout(problem, (5, 6), (1, 2, 3, 4), "", 0, "stop", trained=(True, False, False, True))
    short = Rollout(problem, (7,), (8,), "", 1, "stop")
    rows, positions = trained_rows([tool, short])
    assert rows.tolist() == [0, 0, 1] and positions.tolist() == [1, 4, 0]  # the state before each trained token
    for batch in ([tool, short], [short, tool], [short]):
        read = pad(batch, torch.device("cpu"))[trained_rows(batch)].tolist()
        assert read == [token for rollout in batch for token in ((6, 3) if rollout is tool else (7,))]


SPLITS = [[[0, 1, 2, 3, 4, 5, 6], [7], [8]], [[8, 0], [3, 1, 2, 6], [7, 5, 4]], [[i] for i in range(9)]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_9_any_split_into_micro_batches_gives_the_same_update(reduction, split):
    method = weighted(reduction)
    step = make_step(method, ROWS, TEACHER, TOKENS, layout=LAYOUT, horizon=7)
    whole_loss, whole = logit_gradient(method, ROWS, step)
    total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(ROWS)
    for part in split:
        index = torch.tensor(part)
        leaf = ROWS[index].requires_grad_(True)
        loss, _ = objective(leaf, identity(V), terms_of(method, step, index))
        total += loss.detach()
        grad[index] = torch.autograd.grad(loss, leaf)[0]
    assert abs(total - whole_loss) < 1e-14 and (grad - whole).abs().max() < 1e-15


def test_9_token_mean_is_over_the_step_and_not_a_mean_of_means():
    step = make_step(opd(), ROWS, TEACHER, TOKENS, layout=LAYOUT)
    gap = (ROWS.log_softmax(-1) - TEACHER.log_softmax(-1))[TOKENS, TOKENS]
    form = gap[:, None] * (torch.eye(V, dtype=torch.float64)[TOKENS] - ROWS.softmax(-1))
    assert (logit_gradient(opd(), ROWS, step)[1] - form / 9).abs().max() < 1e-15
    naive = torch.cat([form[:6] / 6, form[6:] / 3]) / 2  # two micro-batches of 6 and 3 tokens, averaged
    assert (naive - form / 9).abs().max() > 1e-3


def test_10_gap_recovery():
    def at(step: int, accuracy: float | None, se: float | None = None, who: str = "student") -> Evaluation:
        return Evaluation(step=step, who=who, accuracy=accuracy, accuracy_se=se)

    teacher = at(0, 0.8, who="teacher")
    assert gap_recovered(at(0, 0.3), at(9, 0.3), teacher).recovered == 0.0
    assert gap_recovered(at(0, 0.3), at(9, 0.8), teacher).recovered == pytest.approx(1.0)
    assert gap_recovered(at(0, 0.3), at(9, 0.2), teacher).recovered == pytest.approx(-0.2)
    for nothing in (at(0, 0.8), at(0, None)):  # the teacher is not ahead, or the accuracy is unknown
        assert gap_recovered(nothing, at(9, 0.9), teacher) is None
    # share .5 of a room of .5: slopes 1 - .5, 1, .5 on the three errors, over .5
    found = gap_recovered(at(0, 0.3, 0.02), at(9, 0.55, 0.03), at(0, 0.8, 0.04, "teacher"))
    assert found.recovered == pytest.approx(0.5)
    assert found.se == pytest.approx((0.01**2 + 0.03**2 + 0.02**2) ** 0.5 / 0.5)
    assert gap_recovered(at(0, 0.3, 0.02), at(9, 0.55), teacher).se is None
