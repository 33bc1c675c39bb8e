"""Tile functions: a tile of ΔW (m, n) from its factors, knowing nothing of what becomes of it.

    tile(factors, row, column) -> (BLOCK, BLOCK) fp32, ΔW[row : row + BLOCK, column : column + BLOCK]

There is one for each structure of peftkit/delta that declares `tiled`, and its `factors` are the tensors named there,
in that order. A matrix is the tuple (pointer, rows, columns, stride of a row, stride of a column); entries beyond its
edges read as 0. Only the operands of a product are in the factors' own dtype, all else is fp32.
"""

from typing import Any

import triton
import triton.language as tl

BLOCK = tl.constexpr(64)
#: ranks summed in one step: the least that the tensor cores of sm_80 take of 16-bit numbers
STEP = tl.constexpr(16)


@triton.jit
def window(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a (ROWS, COLUMNS) window of a matrix, and which are inside. 64-bit base, 32-bit offsets from it."""
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    base = matrix[0] + tl.cast(row, tl.int64) * matrix[3] + tl.cast(column, tl.int64) * matrix[4]
    return base + i * matrix[3] + j * matrix[4], (i < matrix[1] - row) & (j < matrix[2] - column)


@triton.jit
def load(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The (ROWS, COLUMNS) window of a matrix at (row, column), 0 beyond its edges."""
    pointers, inside = window(matrix, row, column, ROWS, COLUMNS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store(matrix, row, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a (ROWS, COLUMNS) window of a matrix, rounded to its dtype, and nothing beyond its edges."""
    pointers, inside = window(matrix, row, column, ROWS, COLUMNS)
    tl.store(pointers, values.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def gather(matrix, i, j, inside):
    """matrix[i, j] where `inside`, else 0. i, j: indices that broadcast to the shape of `inside`."""
    return tl.load(matrix[0] + tl.cast(i, tl.int64) * matrix[3] + tl.cast(j, tl.int64) * matrix[4], inside, other=0.0)


@triton.jit
def low_rank(factors, row, column):
    """B·A with B (m, r) and A (r, n)."""
    B, A = factors
    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, A[1], STEP):
        left = load(B, row, k, BLOCK, STEP)
        tile = tl.dot(left, load(A, k, column, STEP, BLOCK), tile, input_precision="ieee")
    return tile


@triton.jit
def hadamard(factors, row, column):
    """(B1·A1) ⊙ (B2·A2)."""
    B1, A1, B2, A2 = factors
    return low_rank((B1, A1), row, column) * low_rank((B2, A2), row, column)


@triton.jit
def kron(factors, row, column):
    """C ⊗ D with C (a, c) and D (b, d); factors (C, D), or (C, right, left) with D = left·right."""
    C = factors[0]
    right = factors[1]
    left = None
    b = right[1]
    if len(factors) == 3:
        left = factors[2]
        b = left[1]
    d = right[2]
    i = (row + tl.arange(0, BLOCK))[:, None]
    j = (column + tl.arange(0, BLOCK))[None, :]
    rows = i < C[1] * b
    columns = j < C[2] * d
    if left is None:
        D = gather(right, i % b, j % d, rows & columns).to(tl.float32)
    else:
        D = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, right[1], STEP):
            r = k + tl.arange(0, STEP)
            x = gather(left, i % b, r[None, :], rows & (r < right[1])[None, :])
            y = gather(right, r[:, None], j % d, columns & (r < right[1])[:, None])
            D = tl.dot(x, y, D, input_precision="ieee")
    return gather(C, i // b, j // d, rows & columns).to(tl.float32) * D


@triton.jit
def rotation(factors, row, column):
    """diag(K_1, …, K_k)·W with blocks (k, b, b), held as one matrix (k·b, b), and W (m, n)."""
    K, W = factors
    b = K[2]
    i = (row + tl.arange(0, BLOCK))[:, None]
    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    first = row // b * b
    last = tl.minimum(tl.cdiv(row + BLOCK, b) * b, K[1])
    for start in range(first, last, STEP):
        j = (start + tl.arange(0, STEP))[None, :]
        blocks = gather(K, i, j % b, (i // b == j // b) & (i < K[1]) & (j < K[1]))
        tile = tl.dot(blocks, load(W, start, column, STEP, BLOCK).to(blocks.dtype), tile, input_precision="ieee")
    return tile


#: the class in peftkit/delta that a tile function is of
TILES: dict[str, Any] = {"LowRank": low_rank, "Hadamard": hadamard, "Kron": kron, "Rotation": rotation}
