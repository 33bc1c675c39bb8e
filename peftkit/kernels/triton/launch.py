"""The launches. Nothing is tuned and every choice follows from the shapes, so equal inputs give equal bits."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from peftkit.kernels.triton.kernels import hadamard_backward_kernel, hadamard_kernel, hadamard_moments_kernel
from peftkit.kernels.triton.tiles import BLOCK, STEP

#: of those compiled for sm_80 to sm_120, the one that spills least at every rank
CONFIG: dict[str, Any] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}

#: about how many programs a sum over columns is cut into: two for each multiprocessor of an H100
PROGRAMS = 256

#: what a kernel that cannot be compiled or launched raises: Triton, at arguments that an older one does not know too,
#: the driver, or a compiler they call
FAILURES = (TritonError, RuntimeError, TypeError, ValueError, OSError, subprocess.CalledProcessError)


def hadamard(base: Tensor | None, factors: Sequence[Tensor], scale: float) -> Tensor:
    """As `references.hadamard`."""
    m, n = factors[0].shape[0], factors[1].shape[1]
    out = torch.empty(m, n, dtype=(factors[0] if base is None else base).dtype, device=factors[0].device)
    weight = None if base is None else _matrix(base)
    grid = (triton.cdiv(n, BLOCK.value), triton.cdiv(m, BLOCK.value))
    with torch.cuda.device_of(out):
        hadamard_kernel[grid](_matrix(out), weight, _matrices(factors), scale, **CONFIG)
    return out


def hadamard_moments(base: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """As `references.hadamard_moments`."""
    grid = _grid(*base.shape)
    out = torch.empty(grid[0], 2, base.shape[0], dtype=torch.float32, device=base.device)
    with torch.cuda.device_of(out):
        hadamard_moments_kernel[grid](out, _matrix(base), _matrices(factors), **CONFIG)
    return out.sum(0)


def hadamard_backward(gradient: Tensor, factors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """As `references.hadamard_backward`."""
    B1, A1, B2, A2 = factors
    dB1, dB2 = _left_gradients(gradient, factors, scale)
    dA1, dA2 = _left_gradients(gradient.mT, (A1.mT, B1.mT, A2.mT, B2.mT), scale)
    return [dB1, dA1.mT.contiguous(), dB2, dA2.mT.contiguous()]


def _left_gradients(gradient: Tensor, factors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """dB1 and dB2, (m, r), in the dtype of the factors."""
    B1 = factors[0]
    grid = _grid(*gradient.shape)
    slabs = (grid[0], *B1.shape)
    out1, out2 = (torch.empty(slabs, dtype=torch.float32, device=B1.device) for _ in range(2))
    config = {"RANK": max(STEP.value, triton.next_power_of_2(B1.shape[1])), **CONFIG}
    with torch.cuda.device_of(B1):
        hadamard_backward_kernel[grid](out1, out2, _matrix(gradient), _matrices(factors), scale, **config)
    # summed one by one: the results of an operator must not share memory
    return [out.sum(0).to(B1.dtype) for out in (out1, out2)]


def _grid(rows: int, columns: int) -> tuple[int, int]:
    """Shares of the columns × blocks of rows."""
    blocks = triton.cdiv(rows, BLOCK.value)
    return max(1, min(triton.cdiv(columns, BLOCK.value), PROGRAMS // blocks)), blocks


def _matrices(factors: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    return tuple(map(_matrix, factors))


def _matrix(tensor: Tensor) -> tuple[Any, ...]:
    """What a kernel takes for a matrix: its pointer, sizes and strides."""
    return (tensor, *tensor.shape, *tensor.stride())
