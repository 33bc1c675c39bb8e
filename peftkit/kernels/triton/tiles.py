"""Windows of matrices, and the tile of (B1·A1) ⊙ (B2·A2) that the kernels share.

A matrix is the tuple (pointer, rows, columns, stride of a row, stride of a column); entries beyond its edges read as 0.
Only the operands of a product are in the factors' own dtype, all else is fp32.
"""

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
def low_rank(B, A, row, column):
    """(BLOCK, BLOCK) fp32 of B·A at (row, column), with B (m, r) and A (r, n)."""
    tile = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, A[1], STEP):
        left = load(B, row, k, BLOCK, STEP)
        tile = tl.dot(left, load(A, k, column, STEP, BLOCK), tile, input_precision="ieee")
    return tile


@triton.jit
def hadamard(factors, row, column):
    """(BLOCK, BLOCK) fp32 of (B1·A1) ⊙ (B2·A2) at (row, column)."""
    B1, A1, B2, A2 = factors
    return low_rank(B1, A1, row, column) * low_rank(B2, A2, row, column)
