"""The fused kernel for KL divergences: against torch, in Triton's interpreter, and when it may be asked for."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_loop import changed, metrics, run

from opdkit import kernels
from opdkit.catalogue import build_method
from opdkit.config import parse_recipe
from opdkit.divergences import divergence
from opdkit.errors import RecipeError
from opdkit.head import Head, HeadRows, RowTerm, TableRows, objective
from opdkit.kernels import check_kernel, fusable
from opdkit.losses import CrossEntropy, Divergence, Entropy
from opdkit.step import Layout, Scores, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(5, 64), (3, 37), (1, 1), (4, 130), (0, 8)]  # rows, ids: a multiple of the block of 16 and not


@pytest.fixture
def triton():
    """The kernel's module: compiled where there is a CUDA device, else in the interpreter (conftest.py)."""
    pytest.importorskip("triton")
    from opdkit import kernels_triton

    return kernels_triton


@pytest.fixture
def stand_in(monkeypatch) -> list[bool]:
    """In the kernel's place: the same rows by autograd. Returns what was asked for."""
    asked: list[bool] = []

    def kl_rows(z, t, coef, *, reverse):
        asked.append(reverse)
        value, gradient = exact(z, t, reverse)
        z.copy_(coef[:, None] * gradient)
        return value.float()

    monkeypatch.setitem(sys.modules, "opdkit.kernels_triton", SimpleNamespace(kl_rows=kl_rows))
    return asked


def exact(z, t, reverse):
    """Value and gradient by autograd in float64."""
    leaf = z.double().requires_grad_()
    kind = "reverse_kl" if reverse else "forward_kl"
    with torch.enable_grad():
        value = divergence(leaf.log_softmax(-1), t.double().log_softmax(-1), kind)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0].float()


def drawn(n, v, seed=0, spread=4.0):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=draw) * spread
    t, coef = z + torch.randn(n, v, generator=draw), torch.randn(n, generator=draw)
    return z.to(DEVICE), t.to(DEVICE), coef.to(DEVICE)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize(("n", "v"), SIZES)
def test_value_and_gradient_of_a_row(triton, n, v, reverse):
    z, t, coef = drawn(n, v)
    value, gradient = exact(z, t, reverse)
    found = triton.kl_rows(z, t, coef, reverse=reverse, block=16)
    assert torch.allclose(found.double(), value, rtol=1e-5, atol=2e-6)
    assert torch.allclose(z, coef[:, None] * gradient, rtol=1e-5, atol=1e-6)


def test_a_hand_computed_row(triton):
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p, q) = log 2 - log 3 / 2 and its gradient is -+ log 3 / 4; KL(q, p)'s is p - q."""
    for reverse, value, slope in ((True, 0.1438410, 0.2746531), (False, 0.1308120, 0.25)):
        z, t, coef = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.25, 0.75]]).log() + 5, torch.tensor([2.0])
        z = z.to(DEVICE)
        found = triton.kl_rows(z, t.to(DEVICE), coef.to(DEVICE), reverse=reverse)
        assert found.tolist() == pytest.approx([value], abs=1e-6)
        assert z[0].tolist() == pytest.approx([2 * slope, -2 * slope], abs=1e-6)


@pytest.mark.parametrize("reverse", [True, False])
def test_large_offsets_and_missing_mass(triton, reverse):
    """Logits far from 0, ids that underflow, and rows of a wider buffer."""
    z, t, coef = drawn(4, 50, spread=40.0)
    wide = torch.full((4, 64), 7.0, device=DEVICE)
    wide[:, :50] = z + 300
    value, gradient = exact(wide[:, :50], t - 200, reverse)
    found = triton.kl_rows(wide[:, :50], t - 200, coef, reverse=reverse, block=16)
    assert torch.allclose(found.double(), value, rtol=1e-4, atol=1e-4)
    assert torch.allclose(wide[:, :50], coef[:, None] * gradient, rtol=1e-3, atol=2e-4)
    assert bool((wide[:, 50:] == 7).all())


@pytest.mark.parametrize("reverse", [True, False])
def test_equal_models_have_no_gradient(triton, reverse):
    z, _, coef = drawn(3, 40)
    found = triton.kl_rows(z, z.clone(), coef, reverse=reverse, block=16)
    assert bool((found == 0).all()) and bool((z == 0).all())


def test_nan_stays_nan(triton):
    z, t, coef = drawn(2, 40)
    t[1, 39] = float("nan")
    found = triton.kl_rows(z, t, coef, reverse=True, block=16)
    assert torch.isfinite(found[0]) and torch.isnan(found[1]) and torch.isfinite(z[0]).all()


# ---------------------------------------------------------------------------------------------------------------------
# In the head


def problem(kind="reverse_kl", *, n=11, table=False, temperature=1.7, scale=0.5, dtype=torch.float32, **limits):
    """(hidden states, head, terms) over a head with 5 padded rows; a part of the rows has weight 0."""
    draw = torch.Generator().manual_seed(3)

    def drawn_as(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

    hidden, weight, bias = (drawn_as(*shape).requires_grad_() for shape in ((n, 6), (42, 6), (42,)))
    head = Head(weight, bias, 37, scale, temperature=temperature)
    theirs = HeadRows(drawn_as(n, 7), Head(drawn_as(40, 7), vocab=37))
    full = TableRows(theirs.log_probs(slice(0, n))) if table else theirs
    rows = torch.arange(n, device=DEVICE)
    step = Step(Layout(rows, rows, rows), rows % 37, {"teacher": Scores(torch.zeros(n, device=DEVICE), full=full)})
    coef = torch.rand(n, generator=draw).to(DEVICE) * (rows % 4 > 0)
    return hidden, head, [RowTerm(Divergence(kind, **limits), step, None, coef)]


def result(given, kernel, chunk=4):
    hidden, head, terms = given
    total, rows = objective(hidden, head, terms, chunk, kernel)
    inputs = (hidden, head.weight, head.bias)
    return total.detach(), *rows, *torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_head_gives_the_same_with_it(triton, kind, table, chunk):
    given = problem(kind, table=table)
    for a, b in zip(result(given, "torch", chunk), result(given, "triton", chunk), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_the_head_asks_for_it(stand_in, kind):
    given = problem(kind)
    expected = result(given, "torch")
    assert stand_in == []
    for a, b in zip(expected, result(given, "triton"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)
    assert stand_in == [kind == "reverse_kl"] * 6  # 11 rows in chunks of 4, each in two halves


@pytest.mark.parametrize("given", [
    problem("jsd"), problem(entry_max=0.1), problem(row_max=0.5), problem(dtype=torch.float64),
], ids=["jsd", "entry_max", "row_max", "float64"])  # fmt: skip
def test_what_it_cannot_do_is_left_to_torch(stand_in, given):
    assert all(torch.equal(a, b) for a, b in zip(result(given, "torch"), result(given, "triton"), strict=True))
    hidden, head, terms = problem()
    with torch.no_grad():
        objective(hidden, head, terms, 4, "triton")
    both = [*terms, RowTerm(Entropy(), terms[0].step, None, terms[0].coef)]
    objective(hidden, head, both, 4, "triton")
    assert stand_in == []


def test_which_losses_it_offers():
    assert fusable([Divergence()], None) == Divergence() and fusable([Divergence("forward_kl")], None) is not None
    for losses in ([Divergence(), Entropy()], [CrossEntropy()], [Divergence("total_variation")], []):
        assert fusable(losses, None) is None
    assert fusable([Divergence()], 3.0) is None and fusable([Divergence()], None, torch.float64) is None


# ---------------------------------------------------------------------------------------------------------------------
# In a recipe


@pytest.mark.skipif(DEVICE == "cuda", reason="the run would be on the GPU")
def test_a_cpu_refuses_it(recipe_data):
    with pytest.raises(RecipeError, match="runs on CUDA devices, and this run is on device cpu"):
        run(recipe_data, train__head_kernel="triton")


@pytest.mark.parametrize(("method", "installed", "softcap", "said"), [
    ({"name": "full_opd"}, True, None, None),
    ({"name": "full_opd"}, False, None, "needs a package: pip install triton"),
    ({"name": "full_opd"}, True, 30.0, "no effect"),
    ({"name": "opd"}, True, None, "no effect: it forms one reverse_kl or forward_kl over the whole vocabulary"),
    ({"name": "topk_kl", "k": 4}, True, None, "no effect"),
    ({"name": "gkd"}, True, None, "no effect"),
])  # fmt: skip
def test_methods_that_can_use_it(recipe_data, monkeypatch, method, installed, softcap, said):
    recipe = parse_recipe(changed(recipe_data, method=method, train__head_kernel="triton"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    given = (recipe, build_method(recipe.method.name, recipe.method.arguments), softcap, torch.device("cuda"))
    if said is None:
        check_kernel(*given)
        return
    with pytest.raises(RecipeError, match=said):
        check_kernel(*given)


def test_a_run_hands_its_setting_to_the_head(recipe_data, stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr("opdkit.train.setup.check_kernel", lambda *given: None)
    data = changed(recipe_data, method={"name": "full_opd"}, train__steps=2, eval__kl_prompts=0, eval__teacher=False)
    plain = run(data, output=str(tmp_path / "torch"))
    assert stand_in == []
    ours = run(data, train__head_kernel="triton", output=str(tmp_path / "triton"))
    assert stand_in and all(stand_in)  # the reverse KL each time
    for a, b in zip(metrics(plain), metrics(ours), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
