"""What the host does around a kernel. Nothing is tuned: one configuration, and splits by the shape alone."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (numbers become constexpr when a kernel is launched, and sequences of matrices its arguments)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from peftkit.kernels.triton import kernels, tiles

#: rows and columns of a tile, and the ranks of one product
BM, BN, BR = 64, 64, 16
#: in the backward; with 64, rank 64 spills 81 registers on compute capability 8.0
BN_BACKWARD = 32
_OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
#: programs that the splits of a reduction aim at: enough for the largest GPUs
_PROGRAMS = 512


def delta(structure: str, factors: Sequence[Tensor], scale: float, weight: Tensor | None, row: Tensor | None) -> Tensor:
    """As the operator of that name."""
    tile, arguments, (M, N) = _tiled(structure, factors)
    like = factors[0] if weight is None else weight
    out = torch.empty(M, N, dtype=like.dtype, device=like.device)
    rows = None if row is None else row.float().contiguous()
    grid = triton.cdiv(N, BN), triton.cdiv(M, BM)
    base = None if weight is None else _matrix(weight)
    kernels.delta[grid](
        _matrix(out), base, rows, arguments, M, N, float(scale), TILE=tile, BM=BM, BN=BN, BR=BR, **_OPTIONS
    )
    return out


def moments(structure: str, factors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """As the operator of that name."""
    tile, arguments, (M, N) = _tiled(structure, factors)
    splits = _splits(M, N)
    partial = torch.empty(splits, 2, M, dtype=torch.float32, device=weight.device)
    grid = splits, triton.cdiv(M, BM)
    kernels.moments[grid](partial, _matrix(weight), arguments, M, N, TILE=tile, BM=BM, BN=BN, BR=BR, **_OPTIONS)
    return partial.sum(0)


def hadamard_backward(grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """As the operator of that name."""
    B1, A1, B2, A2 = factors
    # Where every split leaves its share of the gradients of two factors, (2, splits, rows, columns)
    of_B, of_A = (
        torch.empty(2, _splits(M, N), *factor.shape, dtype=torch.float32, device=grad.device)
        for factor, (M, N) in ((B1, grad.shape), (A1, grad.mT.shape))
    )
    _one_side(of_B, grad, B1, A1, B2, A2)
    _one_side(of_A.mT, grad.mT, A1.mT, B1.mT, A2.mT, B2.mT)
    shares = of_B[0], of_A[0], of_B[1], of_A[1]
    return [share.sum(0).to(factor.dtype) for share, factor in zip(shares, factors, strict=True)]


def _one_side(parts: Tensor, grad: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> None:
    (M, N), R, splits = grad.shape, B1.shape[1], parts.shape[1]
    grid = splits, triton.cdiv(M, BM)
    operands = [_matrix(t) for t in (grad, B1, A1, B2, A2)]
    kernels.hadamard_backward[grid](
        _matrix(parts[0, 0]),
        _matrix(parts[1, 0]),
        parts.stride(1),
        *operands,
        M,
        N,
        R,
        BM=BM,
        BN=BN_BACKWARD,
        BR=max(16, triton.next_power_of_2(R)),
        **_OPTIONS,
    )


def _tiled(structure: str, factors: Sequence[Tensor]) -> tuple[Any, tuple[Any, ...], tuple[int, int]]:
    """The structure's tile function, its arguments, and the shape of ΔW."""
    if structure == "lowrank":
        B, A = factors
        return tiles.lowrank, (_matrix(B), _matrix(A), A.shape[0]), (B.shape[0], A.shape[1])
    if structure == "hadamard":
        B, A = factors[:2]
        operands = tuple(_matrix(f) for f in factors)
        return tiles.hadamard, (*operands, A.shape[0]), (B.shape[0], A.shape[1])
    if structure == "kron":
        C, D = factors
        (a, c), (b, d) = C.shape, D.shape
        return tiles.kron, (_matrix(C), _matrix(D), b, d), (a * b, c * d)
    K, W = factors
    return tiles.rotation, (_matrix(K.flatten(0, 1)), _matrix(W), K.shape[-1]), (W.shape[0], W.shape[1])


def _matrix(t: Tensor) -> tuple[Tensor, int, int]:
    return t, t.stride(0), t.stride(1)


def _splits(M: int, N: int) -> int:
    """Into how many parts the columns are divided."""
    return max(1, min(triton.cdiv(N, BN), _PROGRAMS // triton.cdiv(M, BM)))
