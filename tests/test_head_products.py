"""The head's products and its memory: precision by what the CPU can multiply, buffers that are used again."""

import pytest
import torch
from synthetic import logits
from test_head import ALL, BIAS, HIDDEN, STEP, TABLE, TEACHER, WEIGHT, D, N, Recorder, V, close, dense, leaves, terms_of
from torch import Tensor

from opdkit import lm_head, scratch, signals
from opdkit.divergences import divergence
from opdkit.head import Head, HeadRows, RowTerm, objective, score_rows
from opdkit.losses import Divergence
from opdkit.step import Layout, Scores, Step

LOW = {name: t.to(torch.bfloat16) for name, t in (("hidden", HIDDEN), ("weight", WEIGHT[:V]), ("bias", BIAS[:V]))}
NAMES = ("policy_gradient", "reverse_kl_full", "forward_kl_top_bucket", "jsd_table")


@pytest.fixture(autouse=True)
def small_columns(monkeypatch):
    monkeypatch.setattr(lm_head, "COLUMN_ENTRIES", 4 * D)


def multiplying(monkeypatch, *dtypes: torch.dtype) -> None:
    """Let the CPU have instructions for some precisions only."""
    monkeypatch.setattr(lm_head, "multiplies", lambda dtype: dtype == torch.float32 or dtype in dtypes)


def gradients(inputs: dict[str, Tensor], chunk: int | None = 3) -> list[Tensor]:
    hidden, weight, bias = (t.clone().requires_grad_() for t in inputs.values())
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    loss, _ = objective(hidden, Head(weight, bias), terms_of(NAMES, dtype), chunk)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


def test_a_cpu_without_low_precision_multiplies_in_float32(monkeypatch):
    multiplying(monkeypatch)
    loss, *found = gradients(LOW)
    expected_loss, *expected = gradients({name: t.float() for name, t in LOW.items()})
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(found, expected, strict=True))
    low, wide = (score_rows(Head(i["weight"], i["bias"]), i["hidden"], STEP.tokens, top_k=2)
                 for i in (LOW, {name: t.float() for name, t in LOW.items()}))  # fmt: skip
    assert torch.equal(low.sampled, wide.sampled) and torch.equal(low.top_ids, wide.top_ids)


def test_autocast_asks_in_vain_for_what_the_cpu_cannot_multiply(monkeypatch):
    multiplying(monkeypatch)
    inputs = {name: t.float() for name, t in zip(LOW, (HIDDEN, WEIGHT[:V], BIAS[:V]), strict=True)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(inputs)
    assert all(map(torch.equal, found, gradients(inputs)))


def test_autocast_reaches_the_products_of_a_teacher_too(monkeypatch):
    multiplying(monkeypatch, torch.bfloat16)
    inputs = HIDDEN, WEIGHT[:V], logits(N, 3, seed=22), logits(V, 3, seed=23)
    student, weight, theirs, table = (t.to(torch.bfloat16) for t in inputs)

    def loss(wide: bool) -> Tensor:
        h, w, g, q = (t.float() if wide else t for t in (student, weight, theirs, table))
        scores = Scores(STEP.views["full"].sampled.float(), full=HeadRows(g, Head(q)))
        step = Step(STEP.layout, STEP.tokens, {"teacher": scores})
        return objective(h, Head(w), [RowTerm(Divergence(), step, None, torch.ones(N))], 3)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(wide=True)
    assert torch.equal(found, loss(wide=False)) and not torch.equal(found, loss(wide=True))


@pytest.mark.parametrize("native", [(), (torch.bfloat16,)], ids=["float32", "bfloat16"])
def test_either_way_is_close_to_float64(native, monkeypatch):
    multiplying(monkeypatch, *native)
    expected = gradients({name: t.double() for name, t in LOW.items()})
    tolerance = 2e-2 if native else 4e-3  # the second is bfloat16's rounding of the finished gradient, 2^-8
    for found, exact in zip(gradients(LOW), expected, strict=True):
        assert (found.double() - exact).norm() <= tolerance * exact.norm()


def test_float32_is_multiplied_everywhere_and_an_unknown_precision_nowhere():
    lm_head.multiplies.cache_clear()
    assert lm_head.multiplies(torch.float32) and not lm_head.multiplies(torch.float8_e4m3fn)


def test_results_can_be_written_to_memory_at_hand():
    head, room = Head(WEIGHT, BIAS, V, softcap=3.0), torch.full((N, V), torch.nan, dtype=torch.float64)
    assert head.logits(HIDDEN, room) is room and torch.equal(room, head.logits(HIDDEN))
    rows = HeadRows(HIDDEN, head)
    found = rows.log_probs(slice(1, 4), room[:3])
    assert found.data_ptr() == room.data_ptr() and close(found, dense(HIDDEN, head)[1:4])


def test_every_chunk_uses_the_first_ones_memory_and_a_teacher_half_as_much(monkeypatch):
    monkeypatch.setattr(lm_head, "BLOCK_ENTRIES", V)  # elementwise work on one row
    for names in (("reverse_kl_full",), ("reverse_kl_full", "jsd_full")):
        hidden, head = leaves({}, bias=False)
        scratch.release()
        with Recorder() as recorder:
            objective(hidden, head, terms_of(names), 6)[0].backward()  # chunks of 6 rows and 1, halves of 3, 3 and 1
        assert recorder.fresh.count((6 * V,)) == recorder.fresh.count((3 * V,)) == 1


def test_memory_that_is_too_large_to_keep_is_still_one_for_all_chunks(monkeypatch):
    monkeypatch.setattr(lm_head, "BLOCK_ENTRIES", V)
    monkeypatch.setattr(scratch, "KEPT", 0)
    hidden, head = leaves({}, bias=False)
    with Recorder() as recorder:
        objective(hidden, head, terms_of(("reverse_kl_full", "jsd_full")), 6)[0].backward()
    assert recorder.fresh.count((6, V)) == recorder.fresh.count((3, V)) == 1


def test_an_upstream_gradient_scales_the_buffers_in_place():
    hidden, head = leaves({}, bias=False)
    loss, _ = objective(hidden, head, terms_of(ALL))
    once = [g.clone() for g in torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)]
    with Recorder() as kept:
        (3 * loss).backward(retain_graph=True)
    first = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    with Recorder() as last:
        (3 * loss).backward()
    assert (V, D) in kept.made and (N, D) in kept.made
    assert (V, D) not in last.made and (N, D) not in last.made
    for g, a, b in zip(once, first, (hidden.grad, head.weight.grad), strict=True):
        assert torch.equal(a, 3 * g) and torch.equal(b, a)


def test_a_full_divergence_is_the_same_in_any_part(monkeypatch):
    student = HeadRows(logits(N, D, seed=21), Head(WEIGHT[:V]))
    none = STEP.views["full"].sampled
    views = {
        "student": Scores(none, full=student),
        "teacher": Scores(none, full=TEACHER),
        "table": Scores(none, full=TABLE),
    }
    step = Step(Layout(*(torch.arange(N),) * 3), STEP.tokens, views)
    p = dense(student.hidden, student.head)
    for name, q in (("teacher", dense(TEACHER.hidden, TEACHER.head)), ("table", TABLE.table)):
        expected = divergence(p, q, "reverse_kl")
        for entries in (4, 8 * V, 2**24):  # one row, two rows, all rows at a time
            monkeypatch.setattr(signals, "CHUNK_ENTRIES", entries)
            assert close(signals.full_divergence(step, name, "reverse_kl"), expected)
