"""Rotations from skew-symmetric blocks: Cayley's map R = (I + Q)(I − Q)⁻¹, which OFT and BOFT share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.adapters.options import require
from peftkit.kernels.torch_private import eager, exporting_onnx


def bound_on_norm(kind: str, constraint: float | None, size: int) -> float | None:
    """Return the bound on ‖Q‖_F that a constraint means for so many rotated coordinates."""
    if constraint is None:
        return None
    limits = torch.finfo(torch.float32)
    fits = limits.tiny <= constraint * size <= limits.max
    require(fits, kind, "constraint", constraint, f"None, or a positive number that float32 holds {size} times")
    return constraint * size


def upper_triangle(size: int, device: torch.device) -> Tensor:
    """Return where the entries above the diagonal are in a block (b, b) read row by row, (b(b−1)/2,)."""
    row, column = torch.triu_indices(size, size, 1, device=device)
    return row * size + column


def bounded(skew: Tensor, bound: float | None) -> Tensor:
    """Return the triangles of Q in at least fp32, scaled so that ‖Q‖_F, √2 times their norm, is at most the bound."""
    skew = skew.to(torch.promote_types(skew.dtype, torch.float32))
    if bound is None:
        return skew
    norm = math.sqrt(2) * torch.linalg.vector_norm(skew)
    return skew * torch.where(norm > bound, bound / norm.clamp(min=bound), torch.ones_like(norm))


def skew_blocks(skew: Tensor, upper: Tensor, size: int) -> Tensor:
    """Return Q (…, b, b) from its upper triangles (…, b(b−1)/2).

    upper: (b(b−1)/2,), where in a block the entries of a triangle are.
    """
    flat = skew.flatten(0, -2)
    half = flat.new_zeros(len(flat), size * size).index_copy(1, upper, flat).unflatten(1, (size, size))
    # Not mT, here and wherever forward transposes: torch's older ONNX exporter does not know it
    return (half - half.transpose(-1, -2)).reshape(*skew.shape[:-1], size, size)


def cayley(skew: Tensor, upper: Tensor, size: int) -> Tensor:
    """Return R − I = 2·(I − Q)⁻¹·Q of Q = skew_blocks(…), (…, b, b): 0 at Q = 0, with no digits lost to I near it."""
    if torch.is_grad_enabled() and eager():
        return cast("Callable[[Tensor, Tensor, int], Tensor]", _Cayley.apply)(skew, upper, size)
    return _solved(skew_blocks(skew, upper, size))


def _solved(Q: Tensor) -> Tensor:
    # I − Q has an inverse for every skew Q: there is nothing to wait for a device to check
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if exporting_onnx():
        return _eliminated(identity, Q)
    return torch.linalg.solve_ex(identity - Q, 2 * Q)[0]


def _eliminated(identity: Tensor, Q: Tensor) -> Tensor:
    """As `_solved` by elimination without pivots, row operations alone: ONNX has no solver.

    xᵀ·(I − Q)·x = ‖x‖² for every x, so that no pivot is below 1.
    """
    size = Q.shape[-1]
    rows = torch.cat([identity - Q, 2 * Q], -1)
    for i in range(size):
        own = rows[..., i : i + 1, :] / rows[..., i : i + 1, i : i + 1]
        rows = rows - (rows[..., i : i + 1] - identity[:, i : i + 1]) * own
    return rows[..., size:]


class _Cayley(torch.autograd.Function):
    """dK = 2·(I − Q)⁻¹·dQ·(I − Q)⁻¹, and (I − Q)⁻¹ = I + K/2 is known: backward solves nothing."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor, upper: Tensor, size: int) -> Tensor:
        K = _solved(skew_blocks(skew, upper, size))
        ctx.save_for_backward(K, upper)
        return K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        K, upper = ctx.saved_tensors
        b = K.shape[-1]  # reshape, since .flatten has no rule for a batch of gradients
        g, KT = grads[0].reshape(-1, b, b), K.mT.reshape(-1, b, b)
        left = torch.baddbmm(g, KT, g, alpha=0.5)  # (I + K/2)ᵀ·g
        gQ = torch.baddbmm(left, left, KT, beta=2.0)
        return (gQ - gQ.mT).reshape(-1, b * b).index_select(1, upper).view(*K.shape[:-2], len(upper)), None, None


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """Return 2Q + 2Q² + … + Qᵗ⁻¹, R − I up to the remainder of (I + Q)(I − Q)⁻¹ = I + 2Q + 2Q² + …."""
    K, power = torch.zeros_like(Q), Q
    for _ in range(terms - 2):
        K, power = K + 2 * power, power @ Q
    return K + power
