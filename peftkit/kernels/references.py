"""What each operator computes, in plain PyTorch, with the name and signature of its Triton launch.

H = (B1·A1) ⊙ (B2·A2) of the factors B1 (m, r), A1 (r, n), B2 (m, r), A2 (r, n), always in that order. Sums are formed
in at least fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftkit.kernels.blocks import BLOCK, accumulation_dtype, row_blocks


def hadamard(base: Tensor | None, factors: Sequence[Tensor], scale: float) -> Tensor:
    """Return base + scale·H, (m, n), rounded once to the dtype of base, or of the factors. base (m, n) or None."""
    B1, A1, B2, A2 = wide = _upcast(factors)
    like = factors[0] if base is None else base
    out = torch.empty(B1.shape[0], A1.shape[1], dtype=like.dtype, device=like.device)
    for block in _blocks(wide):
        rows = (B1[block] @ A1) * (B2[block] @ A2)
        if scale != 1:
            rows = rows * scale
        out[block] = rows if base is None else rows + base[block].to(accumulation_dtype(base.dtype))
    return out


def hadamard_moments(base: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return per row Σ_j base_ij·H_ij and Σ_j H_ij², (2, m), in at least fp32. base (m, n)."""
    B1, A1, B2, A2 = wide = _upcast(factors)
    inner, squares = [], []
    for block in _blocks(wide):
        rows = (B1[block] @ A1) * (B2[block] @ A2)
        inner.append((rows * base[block].to(rows.dtype)).sum(1))
        squares.append(rows.square().sum(1))
    return torch.stack([torch.cat(inner), torch.cat(squares)])


def hadamard_backward(gradient: Tensor, factors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Return the gradients of B1, A1, B2, A2 in scale·H, given the gradient G (m, n) of the result.

    dB1 = (scale·G ⊙ (B2·A2))·A1ᵀ and dA1 = B1ᵀ·(scale·G ⊙ (B2·A2)), and likewise with 1 and 2 exchanged.
    """
    B1, A1, B2, A2 = wide = _upcast(factors)
    dB1, dA1, dB2, dA2 = (torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device) for factor in wide)
    for block in _blocks(wide):
        upstream = gradient[block].to(B1.dtype)
        of1, of2 = (B2[block] @ A2).mul_(upstream), (B1[block] @ A1).mul_(upstream)
        torch.mm(of1, A1.mT, out=dB1[block])
        torch.mm(of2, A2.mT, out=dB2[block])
        dA1.addmm_(B1[block].mT, of1)
        dA2.addmm_(B2[block].mT, of2)
    return [(scale * result).to(factor.dtype) for result, factor in zip((dB1, dA1, dB2, dA2), factors, strict=True)]


def _upcast(factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor.to(accumulation_dtype(factor.dtype)) for factor in factors]


def _blocks(factors: Sequence[Tensor]) -> Iterator[slice]:
    """Rows worked on at once: as many as a CPU's cache holds; on a GPU, as many as are worth the launches."""
    B1, A1 = factors[:2]
    return row_blocks(B1.shape[0], A1.shape[1], size=BLOCK if B1.device.type == "cpu" else 16 * BLOCK)
