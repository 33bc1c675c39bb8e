"""The three kernels. The first two take any structure's tile function. No atomics: all repeat bit for bit."""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from peftkit.kernels.triton.tiles import load, store


@triton.jit
def delta(
    out, weight, row, factors, M, N, scale, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """out = row ∘ (weight + scale·ΔW), one tile per program; weight and row may be None."""
    n0, m0 = tl.program_id(0) * BN, tl.program_id(1) * BM
    values = TILE(factors, m0, n0, M, N, BM, BN, BR) * scale
    if weight is not None:
        values += load(weight, m0, n0, M, N, BM, BN).to(tl.float32)
    if row is not None:
        rows = m0 + tl.arange(0, BM)
        values *= tl.load(row + rows, mask=rows < M, other=0.0)[:, None]
    store(out, values, m0, n0, M, N, BM, BN)


@triton.jit
def moments(partial, weight, factors, M, N, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """partial (splits, 2, M): this split's share of the row sums of ΔW ∘ weight and of ΔW²."""
    split, splits, m0 = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BM
    products, squares = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    share = tl.cdiv(tl.cdiv(N, BN), splits) * BN
    for n0 in range(split * share, tl.minimum(N, (split + 1) * share), BN):
        tile = TILE(factors, m0, n0, M, N, BM, BN, BR)
        products += tl.sum(tile * load(weight, m0, n0, M, N, BM, BN).to(tl.float32), axis=1)
        squares += tl.sum(tile * tile, axis=1)
    rows = m0 + tl.arange(0, BM)
    at = partial + split * 2 * M + rows
    tl.store(at, products, mask=rows < M)
    tl.store(at + M, squares, mask=rows < M)


@triton.jit
def hadamard_backward(
    g1, g2, slab, grad, B1, A1, B2, A2, M, N, R, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """g1, g2 (splits, M, R), `slab` elements a split: its share of the gradients of B1 and B2; BR ≥ R.

    Those of A1 and A2 are the same of the transposed problem, ΔWᵀ = (A1ᵀ·B1ᵀ) ⊙ (A2ᵀ·B2ᵀ): strides change places.
    """
    split, splits, m0 = tl.program_id(0), tl.num_programs(0), tl.program_id(1) * BM
    left1, left2 = load(B1, m0, 0, M, R, BM, BR), load(B2, m0, 0, M, R, BM, BR)
    sums1, sums2 = tl.zeros((BM, BR), tl.float32), tl.zeros((BM, BR), tl.float32)
    share = tl.cdiv(tl.cdiv(N, BN), splits) * BN
    for n0 in range(split * share, tl.minimum(N, (split + 1) * share), BN):
        right1, right2 = load(A1, 0, n0, R, N, BR, BN), load(A2, 0, n0, R, N, BR, BN)
        g = load(grad, m0, n0, M, N, BM, BN).to(tl.float32)
        one = (g * tl.dot(left2, right2, input_precision="ieee")).to(left1.dtype)
        sums1 = tl.dot(one, tl.trans(right1), sums1, input_precision="ieee")
        two = (g * tl.dot(left1, right1, input_precision="ieee")).to(left1.dtype)
        sums2 = tl.dot(two, tl.trans(right2), sums2, input_precision="ieee")
    base = tl.cast(split, tl.int64) * slab
    store((g1[0] + base, g1[1], g1[2]), sums1, m0, 0, M, R, BM, BR)
    store((g2[0] + base, g2[1], g2[2]), sums2, m0, 0, M, R, BM, BR)
