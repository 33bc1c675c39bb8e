"""Rotate or rescale a layer's output, W·x -> W·x + K·(W·x), in few passes: for DoRA, (IA)³ and OFT.

Each function writes a new output and keeps the layer's own for backward, which needs W·x. No other code holds that one:
a write to the new output, counted by autograd or not, changes no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkit.kernels.activations import as_blocks, as_planes, beside, innermost, over_channels, rowwise
from peftkit.kernels.fused import apply, like

#: elements of an activation below which an operation costs more than what it does
_SMALL = 1 << 13


def rotated(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """Return y + K·(y − bias) with K (k, b, b) block-diagonal over the channels of y (…, k·b, *s); bias (k·b,)."""
    K = like(K, y)
    return apply(_Rotated, y, K, bias, spatial) if torch.is_grad_enabled() else _rotated(y, K, bias, spatial)


def rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """Return y + e∘(y − bias) with e (c,) and bias (c,) over the channels of y (…, c, *s)."""
    e = like(e, y)
    if not torch.is_grad_enabled():
        return _rescaled(y, e, bias, spatial)
    return apply(_Rescaled, y, e, bias, spatial)


class _Rotated(torch.autograd.Function):
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
                gK = torch.bmm(pair[0], pair[1].mT).view(-1, *K.shape).sum(0)
        if bias is not None and (for_K or for_bias):
            total = over_channels(g, spatial).view(len(K), -1, 1).to(K.dtype)
            if gK is not None:
                gK = gK - total * bias.to(K.dtype).view(len(K), 1, -1)
            gbias = -(K.mT @ total).reshape(-1).to(bias.dtype) if for_bias else None
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
