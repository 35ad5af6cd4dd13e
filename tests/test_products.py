"""Products of few rows: the same numbers as torch's own, whichever way round they are formed."""

import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opdkit import lm_head, products
from opdkit.head import Head
from opdkit.products import (
    FEW,
    LEAST,
    SOME,
    Linear,
    differs,
    few,
    install,
    linear,
    outer,
    pieces,
    rounded,
    some,
    times,
    wide,
)


@pytest.fixture
def turning(monkeypatch) -> None:
    """As on a processor where products of few rows are turned, and all others are MKL's."""
    monkeypatch.setattr(products, "TURNS", True)
    monkeypatch.setattr(products, "SPLIT", False)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, FEW, FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_torchs(turning, rows, bias):
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(LEAST // 128, 128, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 128, generator=generator, dtype=torch.float64)
    b = torch.randn(w.shape[0], generator=generator, dtype=torch.float64) if bias else None
    found = linear(x, w, b)
    assert found.shape == (rows, w.shape[0]) and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, w, b), rtol=0, atol=1e-12)


def test_only_large_products_of_few_rows_are_turned(turning, monkeypatch):
    large, small = torch.zeros(LEAST // 8, 8), torch.zeros(LEAST // 8 - 1, 8)
    assert few(torch.zeros(1, 8), large) and few(torch.zeros(FEW, 8), large)
    assert not few(torch.zeros(FEW + 1, 8), large)
    assert not few(torch.zeros(0, 8), large)
    assert not few(torch.zeros(1, 8), small)
    assert not few(torch.zeros(1, 8, dtype=torch.bfloat16), large)
    assert not few(torch.zeros(1, 8, device="meta"), large)
    monkeypatch.setattr(products, "TURNS", False)
    assert not few(torch.zeros(1, 8), large)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_heads_logits_do_not_depend_on_it(turning, rows, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1)
    generator = torch.Generator().manual_seed(rows)
    w, low = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 2))
    head = Head(w, bias=w[:, 0].clone(), vocab=47, scale=0.5, softcap=3.0, temperature=0.7, low_rank=low)
    h = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    raw = 0.5 * (h @ torch.cat([w, low], 1)[:47].T + w[:47, 0])
    torch.testing.assert_close(head.logits(h), 3 * torch.tanh(raw / 3) / 0.7, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# oneDNN

WITH_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture(params=["torch", "onednn", "some"])
def preferred(request, monkeypatch) -> bool:
    """Whether products of any size are oneDNN's; "some": those of any size with 5 to 64 rows."""
    if request.param != "torch" and not WITH_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    for module in (products, lm_head):
        monkeypatch.setattr(module, "prefers_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "SPLIT", request.param == "some")
    if request.param == "some":
        monkeypatch.setattr(products, "LEAST", 1)
    for name in ("WIDE_PRODUCT", "WIDE_OUTER", "WIDE_SUM", "WIDE_ROWS"):
        monkeypatch.setattr(products, name, 1)
    return request.param == "onednn"


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, whose products are exact in float32 whatever the order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("sizes", [(5, 7, 3), (70, 33, 129), (1, 4, 2), (1000, 5, 9)])
def test_products_are_exact(sizes, preferred):
    n, k, v = sizes
    assert wide(torch.zeros(n, k), v) == preferred
    x, w, g = whole(n, k), whole(v, k, seed=1), whole(n, v, seed=2)
    assert torch.equal(linear(x, w), x @ w.T) and torch.equal(linear(x, w, w[:, 0]), x @ w.T + w[:, 0])
    assert torch.equal(times(g, w), g @ w)
    assert torch.equal(outer(g, x), g.T @ x) and torch.equal(outer(x, g), x.T @ g)


def test_sums_grow_in_place(preferred, monkeypatch):
    monkeypatch.setattr(products, "OUTER_ENTRIES", 3 * 16)  # parts of 16 columns, and a rest
    a, b, total = whole(9, 37), whole(9, 3, seed=1), whole(37, 3, seed=2)
    expected = total + a.T @ b
    products.add_outer(total, a, b)
    assert torch.equal(total, expected)
    total, right = whole(9, 3, seed=2), whole(37, 3, seed=3)
    expected = total + a @ right
    products.add_times(total, a, right)
    assert torch.equal(total, expected)
    products.add_times(total.fill_(torch.nan), a, right, fresh=True)
    assert torch.equal(total, a @ right)


def test_layouts_do_not_matter(preferred):
    x, w = whole(9, 40), whole(40, 60, seed=1)
    assert torch.equal(times(x[:, 4:20], w[4:20, 3:50]), x[:, 4:20] @ w[4:20, 3:50])
    assert torch.equal(outer(w[:, 5:9], w[:, 20:50]), w[:, 5:9].T @ w[:, 20:50])
    assert torch.equal(linear(w.T[:50], x), w.T[:50] @ x.T)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("x",), ("bias",)])
def test_gradients_are_torchs(frozen, preferred):
    tensors = {"x": whole(12, 6), "weight": whole(8, 6, seed=1), "bias": whole(8, seed=2)}
    grads = []
    for multiply in (linear, F.linear):
        given = {name: t.clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
        (multiply(*given.values()) * whole(12, 8, seed=3)).sum().backward()
        grads.append([t.grad for t in given.values()])
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))


def test_a_layer_reads_any_number_of_axes(preferred):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4, bias=False))
    x = torch.randn(2, 3, 6)
    expected = model(x)
    install(model)
    assert all(type(layer) is (Linear if preferred else torch.nn.Linear) for layer in model)
    torch.testing.assert_close(model(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model.double()(x.double()).float(), expected)


@pytest.mark.parametrize("n", [1, 63, 64, 100, 512, 1000, 1792, 2049])
def test_rows_go_in_pieces_of_few_sizes(n):
    found = list(pieces(n))
    assert [i for p in found for i in range(p.start, p.stop)] == list(range(n))
    assert all(p.stop - p.start in (64, 128, 256, 512) for p in found[:-1]) and found[-1].stop - found[-1].start <= 512


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_where_a_product_may_be_another_than_torchs(monkeypatch, turns, wide):
    monkeypatch.setattr(products, "TURNS", turns)
    monkeypatch.setattr(products, "prefers_onednn", lambda: wide)
    assert differs(torch.float32) is (turns or wide) and differs(torch.float64) is turns and not differs(torch.bfloat16)


def test_what_onednn_is_asked_for(turning, monkeypatch):
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    large = torch.zeros(2048, 64)
    assert wide(large, 64) and not wide(large, 8)  # 2^23 and 2^20 multiplications
    assert not wide(large.double(), 64) and not wide(large.bfloat16(), 64) and not wide(large.to("meta"), 64)
    assert not wide(torch.zeros(2, 2**16), 64)  # turned round instead
    assert few(torch.zeros(2, 2**16), torch.zeros(64, 2**16)) and not few(torch.zeros(4, 2**16), torch.zeros(64, 2**16))
    assert (rounded(255), rounded(256), rounded(257), rounded(640)) == (255, 256, 320, 640)
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    assert not wide(large, 64) and rounded(257) == 257


def test_some_rows_are_onednns_where_its_width_is_half(turning, monkeypatch):
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    large = torch.zeros(LEAST // 8, 8)
    assert not some(torch.zeros(16, 8), large.shape[0])
    monkeypatch.setattr(products, "SPLIT", True)
    assert (SOME.start, SOME.stop - 1) == (5, 64)
    assert [some(torch.zeros(n, 8), large.shape[0]) for n in (4, 5, 64, 65)] == [False, True, True, False]
    assert [few(torch.zeros(n, 8), large) for n in (4, 5, FEW)] == [True, False, False]
    assert not some(torch.zeros(16, 8), large.shape[0] - 1)
    assert not some(torch.zeros(16, 8).double(), large.shape[0])
    assert not some(torch.zeros(16, 8, device="meta"), large.shape[0])


@pytest.mark.parametrize(
    "about, family",
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", 25),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", 26),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", None),
        ("arm", None),
        ("AuthenticAMD", 0),
    ],
)
def test_the_family_of_amds_processors(about, family, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: about)
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    assert products._family() == family


@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_has_the_gradients_of_autograd(frozen, preferred):
    h, w = torch.randn(9, 6).requires_grad_(), torch.randn(50, 6).requires_grad_(not frozen)
    head, dz = Head(w, vocab=47), torch.randn(9, 47)
    (h @ w[:47].T * dz).sum().backward()
    torch.testing.assert_close(head.logits(h.detach()), (h @ w[:47].T).detach())
    torch.testing.assert_close(head.hidden_gradient(dz, h.detach()), h.grad)
    if not frozen:
        total = torch.zeros(50, 6)
        head.add_gradients(total, None, None, dz, h.detach())
        torch.testing.assert_close(total, w.grad)
