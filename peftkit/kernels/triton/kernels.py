"""The kernels of the Hadamard product. Sums are fp32, in a fixed order: partial sums are stored, nothing is atomic."""

import triton
import triton.language as tl

from peftkit.kernels.triton.tiles import BLOCK, hadamard, load, store


@triton.jit
def hadamard_kernel(out, base, factors, scale):
    """out = base + scale·(B1·A1) ⊙ (B2·A2), rounded once. out, base (m, n); base may be None."""
    i = tl.program_id(1) * BLOCK
    j = tl.program_id(0) * BLOCK
    tile = hadamard(factors, i, j) * scale
    if base is not None:
        tile += load(base, i, j, BLOCK, BLOCK).to(tl.float32)
    store(out, i, j, tile, BLOCK, BLOCK)


@triton.jit
def hadamard_moments_kernel(out, base, factors):
    """out[s] = Σ_j base_ij·H_ij and Σ_j H_ij² over the s-th share of the columns, H = (B1·A1) ⊙ (B2·A2).

    out (s, 2, m) fp32, base (m, n).
    """
    i = tl.program_id(1) * BLOCK
    inner = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    share = tl.cdiv(tl.cdiv(base[2], BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * share
    for j in range(first, tl.minimum(first + share, base[2]), BLOCK):
        tile = hadamard(factors, i, j)
        inner += tl.sum(tile * load(base, i, j, BLOCK, BLOCK).to(tl.float32), axis=1)
        square += tl.sum(tile * tile, axis=1)
    rows = i + tl.arange(0, BLOCK)
    pointers = out + tl.program_id(0).to(tl.int64) * 2 * base[1] + rows
    tl.store(pointers, inner, mask=rows < base[1])
    tl.store(pointers + base[1], square, mask=rows < base[1])


@triton.jit
def hadamard_backward_kernel(out1, out2, gradient, factors, scale, RANK: tl.constexpr):
    """out1[s], out2[s] = dB1, dB2 of scale·(B1·A1) ⊙ (B2·A2) from the s-th share of the columns of the gradient G.

    dB1 = (scale·G ⊙ (B2·A2))·A1ᵀ. out1, out2 (s, m, r) fp32, gradient (m, n), r ≤ RANK.

    With G, Ai and Bi transposed and in each other's place, the same kernel gives dA1ᵀ and dA2ᵀ.
    """
    B1, A1, B2, A2 = factors
    i = tl.program_id(1) * BLOCK
    b1 = load(B1, i, 0, BLOCK, RANK)
    b2 = load(B2, i, 0, BLOCK, RANK)
    dB1 = tl.zeros((BLOCK, RANK), tl.float32)
    dB2 = tl.zeros((BLOCK, RANK), tl.float32)
    share = tl.cdiv(tl.cdiv(gradient[2], BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * share
    for j in range(first, tl.minimum(first + share, gradient[2]), BLOCK):
        a1 = load(A1, 0, j, RANK, BLOCK)
        a2 = load(A2, 0, j, RANK, BLOCK)
        upstream = load(gradient, i, j, BLOCK, BLOCK).to(tl.float32) * scale
        of1 = (upstream * tl.dot(b2, a2, input_precision="ieee")).to(b1.dtype)
        of2 = (upstream * tl.dot(b1, a1, input_precision="ieee")).to(b1.dtype)
        dB1 = tl.dot(of1, tl.trans(a1), dB1, input_precision="ieee")
        dB2 = tl.dot(of2, tl.trans(a2), dB2, input_precision="ieee")
    slab = tl.program_id(0).to(tl.int64) * B1[1] * B1[2]
    store((out1 + slab, B1[1], B1[2], B1[2], 1), i, 0, dB1, BLOCK, RANK)
    store((out2 + slab, B1[1], B1[2], B1[2], 1), i, 0, dB2, BLOCK, RANK)
