"""A matrix in pieces that stay in cache, and the dtype its sums are formed in."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Rows are visited in blocks of about this many elements: 1 MiB of fp32, which stays in cache and in memory that malloc
# keeps; with 4 MiB every block is fresh pages, and merging 1.7 GB takes 6.4 s in place of 4.2 s
BLOCK = 1 << 18


def block_size(device: torch.device) -> int:
    """Elements of a block where it is worked on: a GPU has no such cache, and each block costs it launches."""
    return BLOCK if device.type == "cpu" else 64 * BLOCK


def row_blocks(rows: int, columns: int, multiple: int = 1, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover `rows`, each about `size` elements and a multiple of `multiple` rows."""
    step = max(1, size // max(1, columns) // multiple) * multiple
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def tiles(rows: int, columns: int, multiple: int = 1, size: int = BLOCK) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of tiles of about `size` elements, whole rows unless `multiple` of them are more than that."""
    width = columns if multiple * columns <= size else max(1, size // multiple)
    for block in row_blocks(rows, width, multiple, size):
        for start in range(0, columns, width):
            yield block, slice(start, min(start + width, columns))


def row_sqnorms(M: Tensor) -> Tensor:
    """‖M_i‖² per row, (m,), summed in at least fp32. M (m, n)."""
    dtype = accumulation_dtype(M.dtype)
    blocks = (M[rows].to(dtype) for rows in row_blocks(*M.shape))
    return torch.cat([torch.linalg.vector_norm(block, dim=1).square() for block in blocks])


def row_dots(M: Tensor, N: Tensor, dtype: torch.dtype) -> Tensor:
    """<M_i, N_i> per row, (m,), in that dtype. M, N (m, n)."""
    return torch.cat([(M[rows].to(dtype) * N[rows].to(dtype)).sum(1) for rows in row_blocks(*M.shape)])


def column_sqnorms(M: Tensor) -> Tensor:
    """‖M_j‖² per column, (n,), summed in at least fp32, row block by row block. M (m, n)."""
    dtype = accumulation_dtype(M.dtype)
    total = torch.zeros(M.shape[1], dtype=dtype, device=M.device)
    for rows in row_blocks(*M.shape):
        total += M[rows].to(dtype).square().sum(0)
    return total


def column_dots(M: Tensor, N: Tensor, dtype: torch.dtype) -> Tensor:
    """<M_j, N_j> per column, (n,), in that dtype, row block by row block. M, N (m, n)."""
    blocks = (M[rows].to(dtype) * N[rows].to(dtype) for rows in row_blocks(*M.shape))
    return functools.reduce(torch.add, (block.sum(0) for block in blocks))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of numbers of `dtype` are formed in: at least fp32."""
    if dtype.itemsize < 2:  # torch does not promote the 8-bit floats
        return torch.float32
    return torch.promote_types(dtype, torch.float32)


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that its sums are formed in."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry of a tensor is infinite or NaN.

    Example:
        >>> from peftkit.kernels.blocks import all_finite
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([0.0, float("nan"), 1.0])), all_finite(torch.ones(0))
        (True, False, True)
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.itemsize < 2 else tensor
    # The least and the largest entry are NaN if any is, and are found in a ninth of the time of isfinite (CPU, fp32)
    return bool(torch.stack(wide.detach().aminmax()).isfinite().all())
