"""Write a ΔW as one product B·A, exactly: by its structure, or as the matrix beside an identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit.delta.base import Delta, identity_factors
from peftkit.delta.dense import Dense
from peftkit.delta.lowrank import LowRank
from peftkit.delta.stack import LowRankStack, StackedDelta, stack_of


def as_low_rank(delta: Delta) -> LowRank:
    """Write a ΔW (m, n) as one product B·A of at most min(m, n) ranks.

    Args:
        delta: any ΔW. Structures with factors give a small rank; the others are built, and have full rank.

    Returns:
        The same ΔW, exact but for the rounding of its dtype.
    """
    return LowRank(*delta.low_rank_factors())


def as_low_rank_stack(delta: Delta) -> LowRankStack:
    """Write the ΔW of a stack of experts as one product B·A for each expert, as `as_low_rank`."""
    whole = slice(0, delta.shape[0])
    parts = delta.parts if isinstance(delta, StackedDelta) else tuple(map(Dense, delta.matrices(whole)))
    found = stack_of([as_low_rank(part) for part in parts])
    assert isinstance(found, LowRankStack)
    return found


def of_matrix(M: Tensor) -> LowRank:
    """Write a matrix M (m, n) as M·I or I·M, exactly and at full rank."""
    return LowRank(*identity_factors(M))


def side_by_side(blocks: Sequence[tuple[LowRank | None, int, bool]], columns: int) -> LowRank:
    """Stack the ΔW of layers that are fused into one, row block under row block: rank Σ r.

    Args:
        blocks: for every layer its ΔW (None for zeros), its number of rows, and whether its two halves change places.
        columns: n, which all layers share.

    Returns:
        The ΔW (Σ rows, n) of the fused layer.
    """
    found = []
    for low, rows, swapped in blocks:
        if low is None:
            low = LowRank(torch.zeros(rows, 0), torch.zeros(0, columns))
        found.append(LowRank(low.B.roll(rows // 2, 0), low.A) if swapped else low)
    return LowRank(torch.block_diag(*(low.B for low in found)), torch.cat([low.A for low in found]))


def block_diagonal(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return B (Σ m, Σ r) and A (Σ r, n) of the products B·A of some parts, row block under row block."""
    return torch.block_diag(*(B for B, _ in parts)), torch.cat([A for _, A in parts])


def balanced(delta: LowRank) -> LowRank:
    """Scale the columns of B and the rows of A to equal norms, which narrow dtypes hold best; B·A stays the same."""
    up, down = torch.linalg.vector_norm(delta.B, dim=0), torch.linalg.vector_norm(delta.A, dim=1)
    live = (up > 0) & (down > 0)
    by = torch.where(live, (down / up.masked_fill(~live, 1.0)).sqrt(), torch.ones_like(up))
    by = by.masked_fill(by == 0, 1.0)
    return LowRank(delta.B * by, delta.A / by[:, None])
