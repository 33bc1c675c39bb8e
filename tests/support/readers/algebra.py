"""Formulas shared by the readers: no file names, no loader's rules. W is (o, i, *k) everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def product(up: Tensor, down: Tensor) -> Tensor:
    """up·down with everything after the first axis flattened."""
    return up.flatten(1) @ down.flatten(1)


def tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ_mn up[o,m]·mid[m,n,*k]·down[n,i], with up (o, r) and down (r, i)."""
    return torch.einsum("mn...,om,ni->oi...", mid, up, down)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """C ⊗ D with D (b, d, *k): row (a, b), column (c, d), the kernel last."""
    blocks = torch.einsum("ac,bd...->abcd...", first, second)
    return blocks.flatten(0, 1).flatten(1, 2)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(o,) shaped to multiply the rows of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def row_norms(weight: Tensor) -> Tensor:
    """‖W[o]‖ over everything else, shaped (o, 1, …)."""
    return per_row(weight.flatten(1).norm(dim=1), weight)


def column_norms(weight: Tensor) -> Tensor:
    """‖W[:, i]‖ over outputs and kernel, shaped (1, i, 1, …)."""
    return row_norms(weight.transpose(0, 1)).transpose(0, 1)


def skew(blocks: Tensor) -> Tensor:
    """Q = B − Bᵀ."""
    return blocks - blocks.mT


def clamp_norm(skewed: Tensor, limit: float) -> Tensor:
    """Q scaled down to ‖Q‖ ≤ limit, the norm over all blocks together; limit ≤ 0 means none."""
    norm = skewed.norm() + 1e-8
    return skewed * limit / norm if 0 < limit < norm else skewed


def cayley(skewed: Tensor) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ of each block."""
    identity = torch.eye(skewed.shape[-1], dtype=skewed.dtype)
    return (identity + skewed) @ torch.linalg.inv(identity - skewed)


def rotate_rows(blocks: Tensor, weight: Tensor) -> Tensor:
    """W'[k, m] = Σ_n R[k, n, m]·W[k, n]: Rᵀ applied to each block of rows. Raises where n·b is not o."""
    count, size, _ = blocks.shape
    return torch.einsum("knm,kn...->km...", blocks, weight.reshape(count, size, *weight.shape[1:])).flatten(0, 1)


def butterfly(stages: Tensor, weight: Tensor) -> Tensor:
    """Stage j permutes the rows by (c, 2, 2ʲb/2) and multiplies each block of b by B_j, untransposed."""
    size = stages.shape[-1]
    for level, blocks in enumerate(stages):
        reach = 2**level * size // 2
        weight = weight.unflatten(0, (-1, 2, reach)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        weight = torch.einsum("bij,bj...->bi...", blocks, weight).flatten(0, 1)
        weight = weight.unflatten(0, (-1, reach, 2)).transpose(1, 2).flatten(0, 2)
    return weight
