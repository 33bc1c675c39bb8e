"""What a ΔW that reads a layer's output makes of it: DoRA, (IA)³ and OFT, in few passes over memory.

Each writes the layer's output anew, and its gradient needs W·x. DoRA's output leads back to that, and to keep it costs
nothing where the next operation keeps it anyway.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftkit.geometry import Geometry
from peftkit.kernels.activations import as_blocks, as_planes, beside, few, innermost, over_channels, rowwise, widened
from peftkit.kernels.fused import apply, khatri_rao, like, pair_gradients, pointwise_gradients, sum_pointwise_
from peftkit.kernels.held import Held

#: x and the weight of a layer, in its own shape
Inputs: TypeAlias = "tuple[Tensor, Tensor]"

#: the least |1 + e| that W·x is recovered through: by then two of its bits are lost
_LEAST = 0.25

#: elements of an activation below which an operation costs more than what it does
_SMALL = 1 << 13

#: elements of a layer's output that may as well be kept, and turned by torch's own graph: a rotation of 64×320 takes
#: 0.12 in place of 0.18 ms, one of 256×320 0.47 in place of 0.37
_LITTLE = 1 << 16


def rotated(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """y + K·(y − bias) with K (k, b, b) block-diagonal over the channels of y (…, k·b, *s); bias (k·b,)."""
    if torch.is_grad_enabled() and few(y, spatial) and y.numel() <= _LITTLE:
        turned = widened(y, 0) if bias is None else widened(y, 0) - bias
        mixed = torch.bmm(as_blocks(turned, K, 0), like(K, turned).mT)
        return y + like(mixed.transpose(0, 1).reshape(y.shape), y)
    K = like(K, y)
    return apply(_Rotated, y, K, bias, spatial) if torch.is_grad_enabled() else _rotated(y, K, bias, spatial)


def rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """y + e∘(y − bias) with e (c,) and bias (c,) over the channels of y (…, c, *s)."""
    e = like(e, y)
    if few(y, spatial) or not torch.is_grad_enabled():
        return _rescaled(y, e, bias, spatial)
    return apply(_Rescaled, y, e, bias, spatial)


def decomposed_(
    y: Tensor,
    h: Tensor,
    e: Tensor,
    factors: tuple[Tensor, Tensor | None],
    bias: Tensor | None,
    g: Geometry,
    inputs: Inputs,
) -> Tensor:
    """y + e∘(y − bias) + B·h over y, which is not kept: backward finds it in the result, if there is one by 1 + e.

    y (…, m, *s), made by layer g of `inputs`; h (…, r, *s); e (m,); factors: B (m, r), or F and G of
    B = khatri_rao(F, G, 1); bias (m,).
    """
    out = apply(_Decomposed, y, like(h, y), like(e, y), *factors, bias, *inputs, g)
    if e.requires_grad and out.grad_fn is not None:
        cast(Any, out.grad_fn).held = Held(out)  # the very function that made it, found by it in backward
    return out


def recoverable(y: Tensor, e: Tensor) -> bool:
    """Whether `decomposed_` of y is possible and worth it, and known without waiting for a GPU. y must be no view."""
    if y.numel() <= _LITTLE or not y.is_cpu or y._base is not None:
        return False
    return bool((e.detach() + 1).abs().min() >= _LEAST)


class _Decomposed(torch.autograd.Function):
    """y − bias = (out − bias − B·h)/(1 + e), and Σ g·(B·h) = B∘(Σ g·hᵀ), which B's own gradient is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        e: Tensor,
        F: Tensor,
        G: Tensor | None,
        bias: Tensor | None,
        x: Tensor,
        weight: Tensor,
        g: Geometry,
    ) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, e, F, G, bias, x, weight)
        B = like(F if G is None else khatri_rao(F, G, 1), y)
        y.addcmul_(y, beside(e, g.spatial))
        if bias is not None:  # one more channel of ones: −e∘bias comes with the product
            h = pad(h, (0, 0) * g.spatial + (0, 1), value=1.0)
            B = torch.cat([B, -(e * like(bias, e))[:, None]], 1)
        out = sum_pointwise_(y, h, B, g.spatial)
        ctx.geometry = g
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, e, F, G, bias, x, weight), spatial = grads, ctx.saved_tensors, ctx.geometry.spatial
        for_y, for_h, for_e, *for_factors, for_bias = ctx.needs_input_grad[:6]
        B = like(F if G is None else khatri_rao(F, G, 1), g)
        gh, gB = pointwise_gradients(g, h, B, spatial, for_h, for_e or any(for_factors))
        gy = torch.addcmul(g, g, beside(e, spatial)) if for_y else None
        total = over_channels(g, spatial) if bias is not None and (for_e or for_bias) else None
        ge = None
        if for_e:
            out = _output(ctx)
            sums: Tensor = over_channels(
                g, spatial, _called(ctx.geometry, x, weight, bias, g.dtype) if out is None else out
            )
            if bias is not None and total is not None:
                sums = sums - total * bias.to(sums.dtype)
            if out is not None:
                assert gB is not None
                sums = (sums - (gB.to(sums.dtype) * B.to(sums.dtype)).sum(1)) / (1 + e.to(sums.dtype))
            ge = sums.to(e.dtype)
        pair = (gB if for_factors[0] else None, None)
        if G is not None:
            pair = (None, None) if gB is None else pair_gradients(gB, F, G, 1, for_factors)
        gbias = None if bias is None or total is None or not for_bias else (-e * total).to(bias.dtype)
        return gy, gh, ge, *pair, gbias, None, None, None


class _Rotated(torch.autograd.Function):
    """Keeps y: out leads back to it too, but where that was written over it takes x, which nobody else may keep."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
        ctx.save_for_backward(y, K, bias)
        ctx.spatial = spatial
        return _rotated(y, K, bias, spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (y, K, bias), spatial = grads, ctx.saved_tensors, ctx.spatial
        for_y, for_K, for_bias, _ = ctx.needs_input_grad
        gy = _plus_blocks(g, K.mT, None, spatial) if for_y else None
        gK = gbias = None
        if for_K:
            if rowwise(g, spatial):
                gK = torch.bmm(as_blocks(g, K, spatial).mT, as_blocks(y, K, spatial))
            else:
                pair = as_planes(g, K.shape[-1], spatial), as_planes(y, K.shape[-1], spatial)
                gK = torch.bmm(pair[0], pair[1].mT).unflatten(0, (-1, len(K))).sum(0)
        if bias is not None and (for_K or for_bias):
            total = over_channels(g, spatial).view(len(K), -1, 1).to(K.dtype)
            if gK is not None:
                gK = gK - total * bias.to(K.dtype).view(len(K), 1, -1)
            gbias = -(K.mT @ total).flatten().to(bias.dtype) if for_bias else None
        return gy, gK, gbias, None


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
        ctx.save_for_backward(y, e, bias)
        ctx.spatial = spatial
        return _rescaled(y, e, bias, spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (y, e, bias), spatial = grads, ctx.saved_tensors, ctx.spatial
        for_y, for_e, for_bias, _ = ctx.needs_input_grad
        gy = torch.addcmul(g, g, beside(e, spatial)) if for_y else None
        ge = over_channels(g, spatial, y) if for_e else None
        gbias = None
        if bias is not None and (for_e or for_bias):
            total = over_channels(g, spatial)
            ge = None if ge is None else ge - total * bias.to(total.dtype)
            gbias = (-e * total).to(bias.dtype) if for_bias else None
        return gy, None if ge is None else ge.to(e.dtype), gbias, None


def _output(ctx: Any) -> Tensor | None:
    """What is held, for gradients that nobody differentiates: it leads back to no graph. Once, then it is let go.

    Whoever keeps the graph for a second backward pays a call of the layer; nobody else keeps an output until the next
    step, as they would in a loop that holds its last loss.
    """
    if torch.is_grad_enabled() or ctx.held is None:
        return None
    held, ctx.held = ctx.held, None
    return held.value()


def _called(g: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The layer's output once more."""
    return g.call(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _rotated(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    if y.numel() == K.shape[0] * K.shape[1]:  # one position: a token that is generated
        out = y.clone(memory_format=torch.contiguous_format)
        turned = y if bias is None else y - beside(like(bias, y), spatial)
        out.view(len(K), -1, 1).baddbmm_(K, turned.reshape(len(K), -1, 1))
        return out
    start = None if bias is None else (K @ bias.to(K.dtype).view(len(K), -1, 1)).flatten()
    return _plus_blocks(y, K, start, spatial)


def _rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    if bias is None:
        return torch.addcmul(y, y, beside(e, spatial))
    if y.dtype.itemsize < 4 or y.numel() < _SMALL:  # round once; of a few numbers, one operation less is faster
        return torch.addcmul(y, y - beside(like(bias, y), spatial), beside(e, spatial))
    return torch.addcmul(y, y, beside(e, spatial)).sub_(beside(e * bias.to(e.dtype), spatial))


def _plus_blocks(y: Tensor, K: Tensor, start: Tensor | None, spatial: int) -> Tensor:
    """y − start + K·y, of the shape of y."""
    if y.itemsize >= 4 and not torch.is_grad_enabled():  # I + K holds the digits of K that a sum with y can hold
        return _times_blocks(y, K + torch.eye(K.shape[-1], dtype=K.dtype, device=K.device), start, spatial)
    out = y if start is None else y - beside(start, spatial)
    if not innermost(out, spatial):
        out = out.contiguous()
    if out is y:
        out = y.clone()
    if innermost(out, spatial):
        as_blocks(out, K, spatial).baddbmm_(as_blocks(y, K, spatial), K.mT)
    else:
        planes = as_planes(out, K.shape[-1], spatial)
        planes.baddbmm_(K.repeat(len(planes) // len(K), 1, 1), as_planes(y, K.shape[-1], spatial))
    return out


def _times_blocks(y: Tensor, R: Tensor, start: Tensor | None, spatial: int) -> Tensor:
    """R·y − start, of the shape of y, written once. Not differentiable."""
    by_token = rowwise(y, spatial)
    y = y if innermost(y, spatial) else y.contiguous()
    out = torch.empty_like(y)
    if by_token:
        torch.bmm(as_blocks(y, R, spatial), R.mT, out=as_blocks(out, R, spatial))
    else:
        planes = as_planes(y, R.shape[-1], spatial)
        torch.bmm(R.repeat(len(planes) // len(R), 1, 1), planes, out=as_planes(out, R.shape[-1], spatial))
    return out if start is None else out.sub_(beside(start, spatial))
