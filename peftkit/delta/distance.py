"""Compare two ΔW, by their factors where that is exact, else in blocks of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftkit.delta.base import Delta
from peftkit.delta.hadamard import Hadamard
from peftkit.delta.kron import Kron
from peftkit.delta.lowrank import LowRank
from peftkit.kernels.blocks import row_blocks, tiles

#: Gram matrices of factors are cheaper than rows up to about this many ranks side by side
_RANKS = 256


@torch.no_grad()
def distance(delta: Delta, other: Delta) -> tuple[float, float]:
    """Return ‖delta − other‖ and ‖delta‖, both ΔW (m, n), to an error of 1e-8·‖delta‖."""
    one, two = _low_rank(delta), _low_rank(other)
    if one is not None and two is not None:
        apart = LowRank(torch.cat([one.B, -two.B], 1), torch.cat([one.A, two.A]))
        return _root(apart.sqnorm()), _root(one.sqnorm())
    if (
        isinstance(delta, Kron)
        and isinstance(other, Kron)
        and (delta.C.shape, delta.block) == (other.C.shape, other.block)
    ):
        (C, D), (E, F) = ((kron.C.double(), kron.D.double()) for kron in (delta, other))
        own = C.square().sum() * D.square().sum()
        return _root(own - 2 * (C * E).sum() * (D * F).sum() + E.square().sum() * F.square().sum()), _root(own)
    gap = norm = 0.0
    for block in row_blocks(*delta.shape, math.lcm(delta.row_multiple, other.row_multiple)):
        ours, theirs = delta.rows(block), other.rows(block)
        gap, norm = gap + _square(ours - theirs), norm + _square(ours)
    return math.sqrt(gap), math.sqrt(norm)


def relative(truth: Delta, other: Delta) -> float:
    """Return ‖other − truth‖/‖truth‖: 0 for equal ΔW, infinity where only truth is 0."""
    return ratio(*distance(truth, other))


def ratio(gap: float, norm: float) -> float:
    """Return gap/norm as a relative error: 0 without a gap, infinity without a norm."""
    if gap == 0:
        return 0.0
    return gap / norm if norm else math.inf


@torch.no_grad()
def product(delta: Delta, other: Delta) -> float:
    """Return <delta, other>_F of two ΔW (m, n) in float64, without a matrix of their size."""
    one, two = _low_rank(delta), _low_rank(other)
    if one is not None and two is not None:
        return float(((one.B.mT @ two.B) * (one.A @ two.A.mT)).sum())
    multiple = min(delta.shape[0], math.lcm(delta.row_multiple, other.row_multiple))
    here = ((delta.tile(*tile).double() * other.tile(*tile).double()).sum() for tile in tiles(*delta.shape, multiple))
    return float(sum(here))


@torch.no_grad()
def norm(delta: Delta) -> float:
    """Return ‖ΔW‖_F in float64, where numbers of any size neither overflow nor vanish."""
    low = _low_rank(delta)
    if low is not None:
        return _root(low.sqnorm())
    if isinstance(delta, Kron):
        return math.sqrt(_square(delta.C) * _square(delta.D))
    return math.sqrt(sum(_square(delta.rows(block)) for block in row_blocks(*delta.shape, delta.row_multiple)))


def _low_rank(delta: Delta) -> LowRank | None:
    """The factors in float64, None where there are none or too many."""
    low = delta.khatri_rao if isinstance(delta, Hadamard) and delta.rank**2 <= _RANKS else delta
    return LowRank(low.B.double(), low.A.double()) if isinstance(low, LowRank) and low.rank <= _RANKS else None


def _square(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _root(square: Tensor) -> float:
    return math.sqrt(max(0.0, float(square)))
