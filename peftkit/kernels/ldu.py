"""The first pivots of W = P·L·D·U, in O(r²·(m + n)): what LoLDU starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.kernels.blocks import accumulation_dtype

# A pivot smaller than this, relative to its row of U, is replaced by the row's largest entry: U stays below 1000
_SMALL_PIVOT = 1e-3


@dataclass(frozen=True)
class Pivoting:
    """Holds the rows that were chosen, in order, and the pivots that are none: what must not be decided twice.

    The same weight rounded to another dtype would choose other rows, and would take rounding noise for pivots.
    order (m,) int32: row i of L·D·U is W[order[i]]. dead (2, r) bool: columns with nothing left to eliminate, and
    rows of U with nothing left in them.
    """

    order: Tensor
    dead: Tensor


def pivot(weight: Tensor, rank: int) -> Pivoting:
    """Choose `rank` pivots of W (m, n) by partial pivoting.

    Rows are chosen column by column, so the first `rank` columns alone give the first pivots of the whole matrix.
    """
    panel = weight[:, :rank].to(accumulation_dtype(weight.dtype))
    packed, swaps, _ = torch.linalg.lu_factor_ex(panel)
    chosen = torch.arange(len(weight), dtype=torch.int32, device=weight.device)
    if not swaps.is_meta:
        order = chosen.tolist()
        for i, j in enumerate(swaps.tolist()):
            order[i], order[j - 1] = order[j - 1], order[i]
        chosen = torch.tensor(order, dtype=torch.int32, device=weight.device)
    # What is left of a column, or of a row, once it is only rounding
    noise = max(weight.shape) * torch.finfo(panel.dtype).eps
    columns = packed.diagonal().abs() <= noise * panel.abs().amax()
    half = Pivoting(chosen, torch.stack([columns, torch.zeros_like(columns)]))
    _, upper = _triangles(weight, half)
    rows = upper.abs().amax(1) <= noise * weight[chosen[:rank].long()].abs().amax()
    return Pivoting(chosen, torch.stack([columns, rows]))


def factor(weight: Tensor, pivoting: Pivoting) -> tuple[Tensor, Tensor, Tensor]:
    """Return P·L (m, r), pivots (r,) and U (r, n) with unit diagonal, without further pivoting.

    A pivot that is zero, or tiny beside its row, gives way to the row's largest entry: U stays bounded, and
    P·L·diag(pivots)·U still is W in its first r columns and rows.
    """
    lower, upper = _triangles(weight, pivoting)
    rank = len(upper)
    pivots, largest = upper.diagonal().clone(), upper.abs().amax(1)
    pivots = torch.where(pivots.abs() > _SMALL_PIVOT * largest, pivots, largest)
    empty = pivoting.dead[1] | (largest == 0)
    unit = torch.eye(rank, weight.shape[1], dtype=upper.dtype, device=upper.device)
    upper = torch.where(empty[:, None], unit, upper / pivots.masked_fill(empty, 1.0)[:, None])
    left = torch.zeros_like(lower).index_copy(0, pivoting.order.long(), lower)
    return left, pivots.masked_fill(empty, 0.0), upper


def _triangles(weight: Tensor, pivoting: Pivoting) -> tuple[Tensor, Tensor]:
    """L (m, r) unit lower trapezoidal in order of elimination, and D·U (r, n)."""
    order, columns = pivoting.order.long(), pivoting.dead[0]
    rank = len(columns)
    lower = _unit_lower(weight[order, :rank].to(accumulation_dtype(weight.dtype)), columns)
    top = weight[order[:rank]].to(lower.dtype)
    return lower, torch.linalg.solve_triangular(lower[:rank], top, upper=False, unitriangular=True)


def _unit_lower(panel: Tensor, dead: Tensor) -> Tensor:
    """L of panel = L·U without pivoting, by halves. panel (m, r), m ≥ r; dead (r,) bool -> (m, r)."""
    rank = panel.shape[1]
    if rank == 1:
        lower = torch.where(dead, torch.zeros_like(panel), panel / panel[0].masked_fill(dead, 1.0))
        lower[0] = 1
        return lower
    half = rank // 2
    lower = torch.zeros_like(panel)
    lower[:, :half] = _unit_lower(panel[:, :half], dead[:half])
    corner = torch.linalg.solve_triangular(lower[:half, :half], panel[:half, half:], upper=False, unitriangular=True)
    lower[half:, half:] = _unit_lower(panel[half:, half:] - lower[half:, :half] @ corner, dead[half:])
    return lower
