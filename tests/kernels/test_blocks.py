"""Sums over rows and columns of a matrix go block by block, in at least fp32."""

from __future__ import annotations

import pytest
import torch

from peftkit.kernels.blocks import BLOCK, column_dots, column_sqnorms, row_dots, row_sqnorms

SHAPES = [(3, 5), (1, 7), (2 * BLOCK // 64 + 3, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_and_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M, N = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact, other = M.double(), N.double()
    assert row_sqnorms(M).dtype == column_sqnorms(M).dtype == torch.float32
    assert torch.allclose(row_sqnorms(M).double(), exact.square().sum(1), rtol=1e-5)
    assert torch.allclose(column_sqnorms(M).double(), exact.square().sum(0), rtol=1e-5)
    assert torch.allclose(row_dots(M, N, torch.float64), (exact * other).sum(1))
    assert torch.allclose(column_dots(M, N, torch.float64), (exact * other).sum(0))
