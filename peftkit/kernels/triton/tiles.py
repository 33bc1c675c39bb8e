"""ΔW tile by tile: one function per structure, which knows nothing of what becomes of the tile.

tile(factors, m0, n0, M, N, BM, BN, BR) -> (BM, BN) fp32, rows from m0 and columns from n0, zero outside (M, N).
A matrix is (pointer, row stride, column stride). Products take operands as they are stored and add in fp32.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# (inside a kernel, values have the types of Triton's language)

import triton
import triton.language as tl


@triton.jit
def load(matrix, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """A (BM, BN) tile at (m0, n0), zero outside (M, N). Its base is 64-bit: a matrix may pass 2³¹ elements."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    base = matrix[0] + tl.cast(m0, tl.int64) * matrix[1] + tl.cast(n0, tl.int64) * matrix[2]
    inside = (rows < M - m0)[:, None] & (columns < N - n0)[None, :]
    return tl.load(base + rows[:, None] * matrix[1] + columns[None, :] * matrix[2], mask=inside, other=0.0)


@triton.jit
def store(matrix, values, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The inverse of `load`, rounded once to the dtype of the matrix."""
    rows, columns = tl.arange(0, BM), tl.arange(0, BN)
    base = matrix[0] + tl.cast(m0, tl.int64) * matrix[1] + tl.cast(n0, tl.int64) * matrix[2]
    inside = (rows < M - m0)[:, None] & (columns < N - n0)[None, :]
    values = values.to(matrix[0].dtype.element_ty)
    tl.store(base + rows[:, None] * matrix[1] + columns[None, :] * matrix[2], values, mask=inside)


@triton.jit
def product(B, A, R, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """A tile of B (M, R) · A (R, N)."""
    sums = tl.zeros((BM, BN), tl.float32)
    for r0 in range(0, R, BR):
        left, right = load(B, m0, r0, M, R, BM, BR), load(A, r0, n0, R, N, BR, BN)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    return sums


@triton.jit
def lowrank(factors, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """B·A; factors: B, A, rank."""
    return product(factors[0], factors[1], factors[2], m0, n0, M, N, BM, BN, BR)


@triton.jit
def hadamard(factors, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """(B1·A1) ⊙ (B2·A2); factors: B1, A1, B2, A2, rank."""
    one = product(factors[0], factors[1], factors[4], m0, n0, M, N, BM, BN, BR)
    return one * product(factors[2], factors[3], factors[4], m0, n0, M, N, BM, BN, BR)


@triton.jit
def kron(factors, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """C ⊗ D; factors: C, D, rows of D, columns of D."""
    C, D = factors[0], factors[1]
    rows, columns = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = C[0] + (rows // factors[2])[:, None] * C[1] + (columns // factors[3])[None, :] * C[2]
    outer = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = D[0] + (rows % factors[2])[:, None] * D[1] + (columns % factors[3])[None, :] * D[2]
    return outer * tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rotation(factors, m0, n0, M, N, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """diag(K_1, …)·W; factors: K as a matrix (M, b) of stacked blocks, W, b."""
    K, W, b = factors[0], factors[1], factors[2]
    rows = m0 + tl.arange(0, BM)
    sums = tl.zeros((BM, BN), tl.float32)
    # The columns of the blocks that these rows are in, without those of the other rows' blocks
    for k0 in range((m0 // b) * b, tl.minimum(((m0 + BM + b - 1) // b) * b, M), BR):
        other = k0 + tl.arange(0, BR)
        same = (rows[:, None] // b == other[None, :] // b) & (rows < M)[:, None] & (other < M)[None, :]
        block = tl.load(
            K[0] + tl.cast(rows, tl.int64)[:, None] * K[1] + (other % b)[None, :] * K[2], mask=same, other=0.0
        )
        sums = tl.dot(block, load(W, k0, n0, M, N, BR, BN).to(block.dtype), sums, input_precision="ieee")
    return sums
