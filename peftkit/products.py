"""y + ΔW·x in as few passes over memory as it takes.

Activations are the largest things a training step writes, and a write into fresh memory costs more than the arithmetic.
So the last product of a route adds into what is there, and backward makes one new activation at most. Each function can
be differentiated twice: what its backward reads are its inputs.

The channels of an activation (…, c, *s) stand before `spatial` dimensions. In memory they are innermost, as in a Linear
and in channels_last: `tokens` (T, c); or each is a plane: `planes` (batch, c, S).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.blocks import accumulation_dtype, row_blocks
from peftkit.geometry import Geometry

#: asked at every call of a layer, where looking them up would cost as much as asking
_compiling, _transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active

#: elements of an activation below which an operation costs more than what it does
_SMALL = 1 << 13


def eager() -> bool:
    """Whether operations run as they are written: to a tracer or a transform, these are opaque or in its way."""
    return not (_compiling() or _transforming())


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which knows nothing of functions with their own backward."""
    return not _compiling() and _transforming()


def add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    """out += B on every run of r channels of h. out (…, a·v, *s); h (…, a·r, *s); B (v, r)."""
    h, B = _like(h, out), _like(B, out)
    if not torch.is_grad_enabled():
        return _add_pointwise_(out, h, B, spatial)
    return _apply(_AddPointwise, out, h, B, spatial)


def khatri_rao(F: Tensor, G: Tensor, dim: int) -> Tensor:
    """Every pair of runs along a dimension: F (m, r), G (m, r) -> (m, r²) for 1; (r, n), (r, n) -> (r², n) for 0."""
    return (F.unsqueeze(dim + 1) * G.unsqueeze(dim)).flatten(dim, dim + 1)


def contracted(x: Tensor, F: Tensor, G: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
    """x for the layer itself, and g.contract(x, A) with A = F, or khatri_rao(F, G, 0), which waits for no backward.

    The gradient that comes back to the x that is returned is added to in place, so that backward makes no second one
    of its size: whoever reads it must make that gradient anew, as products do. F, G (r, c·K); g ungrouped.
    """
    plain = G is None and not (x.requires_grad and F.requires_grad)  # and a constant F needs no x in backward
    if plain or not torch.is_grad_enabled() or g.transposed or not g.direct:
        return x, g.contract(x, F if G is None else khatri_rao(F, G, 0))
    passed, h = cast("Callable[..., tuple[Tensor, Tensor]]", _Contracted.apply)(x, F, G, g)
    return passed if x.requires_grad else x, h


def add_pairs_(out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
    """`add_pointwise_` with B = khatri_rao(F, G, 1), which does not wait for backward. F, G (m, r); h (…, r², *s)."""
    return _apply(_AddPairs, out, _like(h, out), F, G, spatial)


def rotated(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """y + K·(y − bias) with K (k, b, b) block-diagonal over the channels of y (…, k·b, *s); bias (k·b,)."""
    K = _like(K, y)
    return _apply(_Rotated, y, K, bias, spatial) if torch.is_grad_enabled() else _rotated(y, K, bias, spatial)


def rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """y + e∘(y − bias) with e (c,) and bias (c,) over the channels of y (…, c, *s)."""
    e = _like(e, y)
    return _apply(_Rescaled, y, e, bias, spatial) if torch.is_grad_enabled() else _rescaled(y, e, bias, spatial)


class _AddPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(h, B)
        ctx.spatial = spatial
        return _add_pointwise_(out, h, B, spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, B), (_, for_h, for_B, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        return g, *_pointwise_gradients(g, h, B, ctx.spatial, for_h, for_B), None


class _Contracted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, F: Tensor, G: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, F, G)
        ctx.set_materialize_grads(False)
        ctx.geometry = g
        return x.view_as(x), g.contract(x, F if G is None else khatri_rao(F, G, 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gx, gh), (x, F, G), (for_x, *for_pair, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        if gh is None:
            return gx, None, None, None
        A = _like(F if G is None else khatri_rao(F, G, 0), gh)
        gx, gA = _contraction_gradients(gx, gh, x, A, ctx.geometry, for_x, any(for_pair))
        pair = (gA, None) if G is None or gA is None else _pair_gradients(gA, F, G, 0, for_pair)
        return gx, *pair, None


class _AddPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(h, F, G)
        ctx.spatial = spatial
        return _add_pointwise_(out, h, _like(khatri_rao(F, G, 1), out), spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, F, G), (_, for_h, *for_pairs, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        B = _like(khatri_rao(F, G, 1), g)
        gh, gB = _pointwise_gradients(g, h, B, ctx.spatial, for_h, any(for_pairs))
        pair = (None, None) if gB is None else _pair_gradients(gB, F, G, 1, for_pairs)
        return g, gh, *pair, None


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
            if _rowwise(g, spatial):
                gK = torch.bmm(_blocks(g, K, spatial).mT, _blocks(y, K, spatial))
            else:
                pair = _planes(g, K.shape[-1], spatial), _planes(y, K.shape[-1], spatial)
                gK = torch.bmm(pair[0], pair[1].mT).unflatten(0, (-1, len(K))).sum(0)
        if bias is not None and (for_K or for_bias):
            total = _over_channels(g, spatial).view(len(K), -1, 1).to(K.dtype)
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
        gy = torch.addcmul(g, g, _beside(e, spatial)) if for_y else None
        ge = _over_channels(g, spatial, y) if for_e else None
        gbias = None
        if bias is not None and (for_e or for_bias):
            total = _over_channels(g, spatial)
            ge = None if ge is None else ge - total * bias.to(total.dtype)
            gbias = (-e * total).to(bias.dtype) if for_bias else None
        return gy, None if ge is None else ge.to(e.dtype), gbias, None


def _like(operand: Tensor, activation: Tensor) -> Tensor:
    return operand if operand.dtype == activation.dtype else operand.to(activation.dtype)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return cast("Callable[..., Tensor]", function.apply)(*arguments)


def _add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    v, r = B.shape
    if out.dim() == h.dim() == 2 and not spatial and out.shape[1] == v:  # rows as they are
        out.addmm_(h, B.mT)
    elif _innermost(out, spatial):
        _tokens(out, v, spatial).addmm_(_tokens(h, r, spatial), B.mT)
    elif out.is_contiguous():
        planes = _planes(out, v, spatial)
        planes.baddbmm_(B.expand(len(planes), -1, -1), _planes(h, r, spatial))
    else:
        out.add_(_from_tokens(_tokens(h, r, spatial) @ B.mT, out.shape, spatial))
    return out


def _pointwise_gradients(
    g: Tensor, h: Tensor, B: Tensor, spatial: int, for_h: bool, for_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of h and B in `add_pointwise_`, where they are wanted, from that of its result."""
    v, r = B.shape
    if _rowwise(g, spatial):
        rows = _tokens(g, v, spatial)
        gh = _from_tokens(rows @ B, h.shape, spatial) if for_h else None
        return gh, rows.mT @ _tokens(h, r, spatial) if for_B else None
    planes = _planes(g, v, spatial)
    gh = torch.bmm(B.mT.expand(len(planes), -1, -1), planes).view(h.shape) if for_h else None
    return gh, torch.bmm(planes, _planes(h, r, spatial).mT).sum(0) if for_B else None


def _contraction_gradients(
    gx: Tensor | None, gh: Tensor, x: Tensor, A: Tensor, g: Geometry, for_x: bool, for_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and A, where they are wanted, from that of h = g.contract(x, A). gx: the rest of x's, written over."""
    alone = not torch.is_grad_enabled() and eager()  # nobody differentiates this, or runs it for a batch of gradients
    if not (alone and g.by_position and gx is not None and gx.dtype == gh.dtype):
        more, gA = g.contraction_gradients(gh, x, A, for_x)
        if gx is None or more is None:
            return more, gA
        return gx.add_(more) if alone else gx + more, gA
    x, (r, n), gA = _like(x, gh), A.shape, None
    if for_A and _rowwise(x, g.spatial):
        gA = _tokens(gh, r, g.spatial).mT @ _tokens(x, n, g.spatial)
    elif for_A:
        gA = torch.bmm(_planes(gh, r, g.spatial), _planes(x, n, g.spatial).mT).sum(0)
    return _add_pointwise_(gx, gh, A.mT, g.spatial), gA


def _pair_gradients(
    gradient: Tensor, F: Tensor, G: Tensor, dim: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of F and G, where they are wanted, from that of khatri_rao(F, G, dim)."""
    pairs = gradient.to(F.dtype).unflatten(dim, (F.shape[dim], G.shape[dim]))
    gF = (pairs * G.unsqueeze(dim)).sum(dim + 1) if wanted[0] else None
    return gF, (pairs * F.unsqueeze(dim + 1)).sum(dim) if wanted[1] else None


def _rotated(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    if y.numel() == K.shape[0] * K.shape[1]:  # one position: a token that is generated
        out = y.clone(memory_format=torch.contiguous_format)
        turned = y if bias is None else y - _beside(_like(bias, y), spatial)
        out.view(len(K), -1, 1).baddbmm_(K, turned.reshape(len(K), -1, 1))
        return out
    start = None if bias is None else (K @ bias.to(K.dtype).view(len(K), -1, 1)).flatten()
    return _plus_blocks(y, K, start, spatial)


def _rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    if bias is None:
        return torch.addcmul(y, y, _beside(e, spatial))
    if y.dtype.itemsize < 4 or y.numel() < _SMALL:  # round once; of a few numbers, one operation less is faster
        return torch.addcmul(y, y - _beside(_like(bias, y), spatial), _beside(e, spatial))
    return torch.addcmul(y, y, _beside(e, spatial)).sub_(_beside(e * bias.to(e.dtype), spatial))


def _plus_blocks(y: Tensor, K: Tensor, start: Tensor | None, spatial: int) -> Tensor:
    """y − start + K·y, of the shape of y."""
    out = y if start is None else y - _beside(start, spatial)
    if not _innermost(out, spatial):
        out = out.contiguous()
    if out is y:
        out = y.clone()
    if _innermost(out, spatial):
        _blocks(out, K, spatial).baddbmm_(_blocks(y, K, spatial), K.mT)
    else:
        planes = _planes(out, K.shape[-1], spatial)
        planes.baddbmm_(K.repeat(len(planes) // len(K), 1, 1), _planes(y, K.shape[-1], spatial))
    return out


# -- an activation as matrices --------------------------------------------------------------------------------------


def _innermost(x: Tensor, spatial: int) -> bool:
    """Whether the channels of one position are neighbours in memory, and everything is dense."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).is_contiguous()


def _rowwise(x: Tensor, spatial: int) -> bool:
    """Whether x is best read as tokens, which without spatial dimensions it is however it lies in memory."""
    return not spatial or _innermost(x, spatial)


def _tokens(x: Tensor, run: int, spatial: int) -> Tensor:
    """(…, a·run, *s) -> (T·a, run)."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).reshape(-1, run)


def _from_tokens(rows: Tensor, shape: torch.Size, spatial: int) -> Tensor:
    """The inverse of `_tokens`: (T·a, run) -> shape."""
    if not spatial:
        return rows.view(shape)
    channel = len(shape) - 1 - spatial
    return rows.view(*shape[:channel], *shape[channel + 1 :], shape[channel]).movedim(-1, channel)


def _planes(x: Tensor, run: int, spatial: int) -> Tensor:
    """(…, a·run, *s) -> (batch·a, run, S)."""
    return x.reshape(-1, run, x.shape[-spatial:].numel() if spatial else 1)


def _blocks(x: Tensor, K: Tensor, spatial: int) -> Tensor:
    """(…, k·b, *s) -> (k, T, b), of innermost channels a view."""
    return _tokens(x, K.shape[0] * K.shape[-1], spatial).unflatten(1, (K.shape[0], -1)).transpose(0, 1)


def _beside(v: Tensor, spatial: int) -> Tensor:
    """A vector over channels, shaped to broadcast against an activation."""
    return v[(...,) + (None,) * spatial] if spatial else v


def _over_channels(g: Tensor, spatial: int, y: Tensor | None = None) -> Tensor:
    """Σ g, or Σ g∘y, over all but the channels, (c,), in at least fp32 and without another activation."""
    dtype = accumulation_dtype(g.dtype)
    if _rowwise(g, spatial):
        c = g.shape[-1 - spatial]
        rows, others = _tokens(g, c, spatial), None if y is None else _tokens(y, c, spatial)
        if others is None:
            return rows.sum(0, dtype=dtype)
        parts = [(rows[b].to(dtype) * others[b].to(dtype)).sum(0) for b in row_blocks(*rows.shape)]
        return torch.stack(parts).sum(0) if parts else rows.new_zeros(c, dtype=dtype)
    planes = _planes(g, g.shape[-1 - spatial], spatial)
    if y is None:
        return planes.sum((0, 2), dtype=dtype)
    others = _planes(y, g.shape[-1 - spatial], spatial)
    width = planes.shape[0] * planes.shape[2]
    parts = [(planes[:, b].to(dtype) * others[:, b].to(dtype)).sum((0, 2)) for b in row_blocks(planes.shape[1], width)]
    return torch.cat(parts)
