"""Singular vectors of a base, for kinds whose factors are made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit.adapters.options import factory


def orthonormal(left: Tensor, right: Tensor) -> Tensor:
    """Return whether UᵀU = VᵀV = 1 but for rounding, a 0-d bool: so it is of what `frame` returns, uncast.

    Args:
        left: U (m, r).
        right: Vᵀ (r, n).
    """
    grams, identity = (left.mT @ left, right @ right.mT), torch.eye(len(right), dtype=left.dtype, device=left.device)
    return torch.stack([(gram - identity).abs().max() for gram in grams]).max() <= 100 * torch.finfo(left.dtype).eps


@torch.no_grad()
def frame(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triples of W (m, n): U (m, r), S (r,) and Vᵀ (r, n).

    The largest element of each column of U is positive, so that the pairs have one sign everywhere.

    Args:
        weight: W.
        rank: r, by default min(m, n).
    """
    new = factory(weight)
    rank = min(weight.shape) if rank is None else rank
    if weight.is_meta:
        rows, columns = weight.shape
        return torch.empty(rows, rank, **new), torch.empty(rank, **new), torch.empty(rank, columns, **new)
    U, S, V = torch.linalg.svd(weight.to(new["dtype"]), full_matrices=False)
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(U.dtype)
    return (U * sign)[:, :rank].contiguous(), S[:rank].clone(), (V * sign.mT)[:rank].contiguous()
