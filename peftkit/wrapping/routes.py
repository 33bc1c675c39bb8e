"""Two ways to apply ΔW, and which is cheaper for one call.

factored  the base layer's output plus ΔW·x through the factors
dense     one layer call with W + ΔW as its weight; or, where the layer computes in 16 bits, its output plus a second
          call with ΔW alone, since rounding W + ΔW to 16 bits loses most of a small ΔW
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.delta import Delta
from peftkit.delta.base import ELEMENT, recomputed
from peftkit.geometry import Geometry, Shape
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.kernels.fused import eager

ROUTES = ("auto", "factored", "dense")


def choose(deltas: Sequence[Delta], shape: Shape, outputs: int, training: bool, narrow: bool) -> str:
    """ "factored" or "dense" by counted operations.

    outputs: output positions of this call. training: the call is differentiated. narrow: it computes in 16 bits.
    """
    layer = 2 * outputs * shape.rows * shape.columns
    build = sum(d.dense_flops() for d in deltas) + ELEMENT * shape.rows * shape.columns
    factored = sum(d.apply_flops(outputs) for d in deltas)
    if training:
        # backward: the input's and the factors' gradients, each about as much as the product itself
        factored *= 3
        # ΔW is built again for backward, differentiated back to its factors, and needs a gradient of its own
        dense = 4 * build + layer + (2 * layer if narrow else 0)
    else:
        dense = build + (layer if narrow else 0)
    return "factored" if factored <= dense else "dense"


def dense(x: Tensor, g: Geometry, weight: Tensor | None, bias: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    """The layer called with W + Σ ΔW, or with Σ ΔW alone. Nothing of their size waits for backward.

    x: the layer's input; weight: W in its layer's shape, or None; bias (m,).
    """
    if not torch.is_grad_enabled():
        return g.call(x, _weight(x, g, weight, deltas), bias)
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    if trained or not g.direct or not eager():
        return recomputed(lambda x: g.call(x, _weight(x, g, weight, deltas), bias), x)
    factors: list[Tensor] = []

    def collect(name: str, factor: Tensor) -> Tensor:
        del name
        factors.append(factor)
        return factor

    for delta in deltas:
        delta.mapped(collect)
    # What torch makes of a batch is a tensor of its own, of anything else a view, which nobody could write into
    lead, item = x.shape[: x.dim() - 1 - g.spatial], x.shape[x.dim() - 1 - g.spatial :]
    batch = x if len(lead) == 1 else x.reshape(lead.numel(), *item)
    y = cast("Callable[..., Tensor]", _Dense.apply)(batch, g, weight, bias, deltas, *factors)
    return y if batch is x else y.reshape(*lead, *y.shape[1:])


class _Dense(torch.autograd.Function):
    """Backward builds ΔW again, and only that: the layer is not called a second time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Geometry,
        weight: Tensor | None,
        bias: Tensor | None,
        deltas: Sequence[Delta],
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, *factors)
        ctx.geometry, ctx.deltas = g, deltas
        return g.call(x, _weight(x, g, weight, deltas), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *factors = ctx.saved_tensors
        g, needed = ctx.geometry, ctx.needs_input_grad
        wanted = [i for i, need in enumerate(needed[5:]) if need]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # A gradient is of one factor alone, though some may be made of others: each gets a name of its own
            factors = [
                factor.view_as(factor) if twice else factor.detach().requires_grad_(need)
                for factor, need in zip(factors, needed[5:], strict=True)
            ]
            own = iter(factors)
            deltas = [delta.mapped(lambda name, factor: next(own)) for delta in ctx.deltas]
            if twice:  # somebody differentiates this: every step of it must be one that can be
                inputs = [x, *(factors[i] for i in wanted)] if needed[0] else [factors[i] for i in wanted]
                y = g.call(x, _weight(x, g, weight, deltas), bias)
                found = list(torch.autograd.grad(y, inputs, grads[0], create_graph=True, allow_unused=True))
                gx = found.pop(0) if needed[0] else None
            else:
                M = total(deltas)
                W = g.weight(M.detach())
                if weight is not None:
                    W = W.add_(weight)
                gx, gW = g.gradients(grads[0], x, W.to(grads[0].dtype), needed[0])
                found = torch.autograd.grad(
                    M, [factors[i] for i in wanted], g.matrix(gW).to(M.dtype), allow_unused=True
                )
        by_factor: list[Tensor | None] = [None] * len(factors)
        for i, gradient in zip(wanted, found, strict=True):
            by_factor[i] = gradient
        return gx, None, None, None, None, *by_factor


def _weight(x: Tensor, g: Geometry, weight: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    return g.weight(total(deltas).to(x.dtype)) if weight is None else changed(weight, deltas, g)


def total(deltas: Sequence[Delta]) -> Tensor:
    """Σ ΔW (m, n), summed in at least fp32, outside autocast."""
    with torch.autocast(deltas[0].device.type, enabled=False):
        first = deltas[0].dense()
        first = first.to(accumulation_dtype(first.dtype))
        return functools.reduce(lambda M, delta: delta.added_to(M), deltas[1:], first)


def changed(weight: Tensor, deltas: Sequence[Delta], g: Geometry) -> Tensor:
    """W + Σ ΔW, rounded once, in the shape, the dtype and the memory format of the layer's weight."""
    acc = accumulation_dtype(weight.dtype)
    return (weight.to(acc) + g.weight(total(deltas))).to(weight.dtype)
