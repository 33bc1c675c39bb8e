"""The operators. Each has one reference in plain torch: its CPU implementation, its fake and its specification.

    delta              (weight or 0) + scale·ΔW, its rows times `row`
    moments            per row <W_i, ΔW_i> and ‖ΔW_i‖²
    hadamard_backward  the gradients of the four factors of (B1·A1) ⊙ (B2·A2) from that of the product

A structure is given by its name and its factors, in the order of the fields of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.blocks import accumulation_dtype, row_blocks
from peftkit.delta.base import Delta
from peftkit.delta.hadamard import Hadamard
from peftkit.delta.kron import Kron
from peftkit.delta.lowrank import LowRank
from peftkit.delta.rotation import Rotation
from peftkit.kernels import choosing

STRUCTURES: dict[str, Callable[..., Delta]] = {
    "lowrank": LowRank,
    "hadamard": Hadamard,
    "kron": Kron,
    "rotation": Rotation,
}
_library = torch.library.Library("peftkit", "DEF")


def structure_of(name: str, factors: Sequence[Tensor]) -> Delta:
    """The ΔW that these factors stand for, in at least fp32."""
    return STRUCTURES[name](*factors).widened()


def _rank(name: str, factors: Sequence[Tensor]) -> int:
    return factors[0].shape[1] if name in ("lowrank", "hadamard") else 1


def _delta(weight: Tensor | None, factors: list[Tensor], structure: str, scale: float, row: Tensor | None) -> Tensor:
    """weight (m, n); row (m,); -> (m, n) in the dtype of the weight, or of the factors."""
    out = scale * structure_of(structure, factors).filled()
    if weight is not None:
        out = weight.to(out.dtype) + out
    if row is not None:
        out = row[:, None].to(out.dtype) * out
    return out.to(factors[0].dtype if weight is None else weight.dtype)


def _delta_kernel(
    weight: Tensor | None, factors: list[Tensor], structure: str, scale: float, row: Tensor | None
) -> Tensor:
    def kernel() -> Tensor:
        from peftkit.kernels.triton import launch

        return launch.delta(structure, factors, scale, weight, row)

    if not choosing.serves(factors, _rank(structure, factors)):
        return _delta(weight, factors, structure, scale, row)
    return choosing.run("delta", kernel, lambda: _delta(weight, factors, structure, scale, row))


def _moments(weight: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    """weight (m, n); -> (2, m) in at least fp32."""
    return torch.stack(Delta.moments(structure_of(structure, factors), weight))


def _moments_kernel(weight: Tensor, factors: list[Tensor], structure: str) -> Tensor:
    def kernel() -> Tensor:
        from peftkit.kernels.triton import launch

        return launch.moments(structure, factors, weight)

    if not choosing.serves(factors, _rank(structure, factors)):
        return _moments(weight, factors, structure)
    return choosing.run("moments", kernel, lambda: _moments(weight, factors, structure))


def _hadamard_backward(grad: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """grad (m, n), factors B1, A1, B2, A2; -> their gradients, without anything of the size of grad."""
    dtype = accumulation_dtype(factors[0].dtype)
    B1, A1, B2, A2 = (factor.to(dtype) for factor in factors)
    gB1, gB2, gA1, gA2 = torch.empty_like(B1), torch.empty_like(B2), torch.zeros_like(A1), torch.zeros_like(A2)
    for block in row_blocks(*grad.shape):
        g = grad[block].to(dtype)
        one, two = g * (B2[block] @ A2), g * (B1[block] @ A1)
        gB1[block], gB2[block] = one @ A1.mT, two @ A2.mT
        gA1 += B1[block].mT @ one
        gA2 += B2[block].mT @ two
    return [g.to(factor.dtype) for g, factor in zip((gB1, gA1, gB2, gA2), factors, strict=True)]


def _hadamard_backward_kernel(grad: Tensor, factors: list[Tensor]) -> list[Tensor]:
    def kernel() -> list[Tensor]:
        from peftkit.kernels.triton import launch

        return launch.hadamard_backward(grad, factors)

    if not choosing.serves(factors, factors[0].shape[1], backward=True):
        return _hadamard_backward(grad, factors)
    return choosing.run("hadamard_backward", kernel, lambda: _hadamard_backward(grad, factors))


def _register(schema: str, reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    _library.impl(name, kernel, "CPU" if choosing.interpreted() else "CUDA")
    torch.library.register_fake(f"peftkit::{name}", reference)
    return getattr(torch.ops.peftkit, name).default


delta = _register(
    "delta(Tensor? weight, Tensor[] factors, str structure, float scale, Tensor? row) -> Tensor", _delta, _delta_kernel
)
moments = _register("moments(Tensor weight, Tensor[] factors, str structure) -> Tensor", _moments, _moments_kernel)
hadamard_backward = _register(
    "hadamard_backward(Tensor grad, Tensor[] factors) -> Tensor[]", _hadamard_backward, _hadamard_backward_kernel
)


def hadamard(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """(B1·A1) ⊙ (B2·A2), (m, n); only the factors wait for backward."""
    return cast("Callable[..., Tensor]", _Hadamard.apply)(B1, A1, B2, A2)


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        return delta(None, list(factors), "hadamard", 1.0, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (g,), (B1, A1, B2, A2) = grads, ctx.saved_tensors
        if not torch.is_grad_enabled():
            return tuple(hadamard_backward(g, [B1, A1, B2, A2]))
        one, two = g * (B2 @ A2), g * (B1 @ A1)  # somebody differentiates this once more
        return one @ A1.mT, B1.mT @ one, two @ A2.mT, B2.mT @ two
