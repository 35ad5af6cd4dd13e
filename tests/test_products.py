"""Products of few rows: the same numbers as torch's own, whichever way round they are formed."""

import pytest
import torch
import torch.nn.functional as F

from opdkit import products
from opdkit.head import Head
from opdkit.products import FEW, LEAST, few, linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, FEW, FEW + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_torchs(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(LEAST // 128, 128, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 128, generator=generator, dtype=torch.float64)
    b = torch.randn(w.shape[0], generator=generator, dtype=torch.float64) if bias else None
    found = linear(x, w, b)
    assert found.shape == (rows, w.shape[0]) and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, w, b), rtol=0, atol=1e-12)


def test_only_large_products_of_few_rows_are_turned():
    large, small = torch.zeros(LEAST // 8, 8), torch.zeros(LEAST // 8 - 1, 8)
    assert few(torch.zeros(1, 8), large) and few(torch.zeros(FEW, 8), large)
    assert not few(torch.zeros(FEW + 1, 8), large)
    assert not few(torch.zeros(0, 8), large)
    assert not few(torch.zeros(1, 8), small)
    assert not few(torch.zeros(1, 8, dtype=torch.bfloat16), large)
    assert not few(torch.zeros(1, 8, device="meta"), large)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_heads_logits_do_not_depend_on_it(rows, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1)
    generator = torch.Generator().manual_seed(rows)
    w, low = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 2))
    head = Head(w, bias=w[:, 0].clone(), vocab=47, scale=0.5, softcap=3.0, temperature=0.7, low_rank=low)
    h = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    raw = 0.5 * (h @ torch.cat([w, low], 1)[:47].T + w[:47, 0])
    torch.testing.assert_close(head.logits(h), 3 * torch.tanh(raw / 3) / 0.7, rtol=0, atol=1e-12)
