"""y + ΔW·x in as few passes over memory as it takes.

Activations are the largest things a training step writes, and a write into fresh memory costs more than the arithmetic.
So the last product of a route adds into what is there, and backward makes one new activation at most. Each function can
be differentiated twice: what its backward reads are its inputs.
Activations are (…, c, *s), with `spatial` dimensions after their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftkit.activations import (
    as_blocks,
    as_planes,
    as_tokens,
    beside,
    few,
    from_tokens,
    innermost,
    over_channels,
    rowwise,
    widened,
)
from peftkit.geometry import Geometry
from peftkit.held import Held

#: asked at every call of a layer, where looking them up would cost as much as asking
_compiling, _transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active

#: x and the weight of a layer, in its own shape
Inputs: TypeAlias = "tuple[Tensor, Tensor]"

#: the least |1 + e| that W·x is recovered through: by then two of its bits are lost
_LEAST = 0.25

#: elements of an activation below which an operation costs more than what it does
_SMALL = 1 << 13

#: elements of a layer's output that may as well be kept, and turned by torch's own graph: a rotation of 64×320 takes
#: 0.12 in place of 0.18 ms, one of 256×320 0.47 in place of 0.37
_LITTLE = 1 << 16


def eager() -> bool:
    """Whether operations run as they are written: to a tracer or a transform, these are opaque or in its way."""
    return not (_compiling() or _transforming())


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which knows nothing of functions with their own backward."""
    return not _compiling() and _transforming()


def add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    """out += B on every run of r channels of h. out (…, a·v, *s); h (…, a·r, *s); B (v, r)."""
    little = few(out, spatial)
    if little and (h.itemsize > out.itemsize or out.shape[1] != B.shape[0]):
        return out.add_(_like(as_tokens(h, B.shape[1], 0) @ _like(B, h).mT, out).view(out.shape))
    h, B = _like(h, out), _like(B, out)
    if little or not torch.is_grad_enabled():
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
    # A constant factor needs no x in backward, nor few numbers a function of their own
    plain = G is None and (few(x, g.spatial) or not (x.requires_grad and F.requires_grad))
    if plain or not torch.is_grad_enabled() or g.transposed or not g.direct:
        return x, g.contract(widened(x, g.spatial), F if G is None else khatri_rao(F, G, 0))
    passed, h = cast("Callable[..., tuple[Tensor, Tensor]]", _Contracted.apply)(x, F, G, g)
    return passed if x.requires_grad else x, h


def add_pairs_(out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
    """`add_pointwise_` with B = khatri_rao(F, G, 1), which does not wait for backward. F, G (m, r); h (…, r², *s)."""
    return _apply(_AddPairs, out, _like(h, out), F, G, spatial)


def rotated(y: Tensor, K: Tensor, bias: Tensor | None, g: Geometry, inputs: Inputs | None = None) -> Tensor:
    """y + K·(y − bias) with K (k, b, b) block-diagonal over the channels of y (…, k·b, *s); bias (k·b,).

    inputs: those of which layer g made y; they are given only if every I + K_i is orthogonal, and spare keeping y.
    """
    if torch.is_grad_enabled() and few(y, g.spatial) and y.numel() <= _LITTLE:
        turned = widened(y, 0) if bias is None else widened(y, 0) - bias
        mixed = torch.bmm(as_blocks(turned, K, 0), _like(K, turned).mT)
        return y + _like(mixed.transpose(0, 1).reshape(y.shape), y)
    K = _like(K, y)
    if not torch.is_grad_enabled():
        return _rotated(y, K, bias, g.spatial)
    x, weight = (None, None) if inputs is None or y.numel() <= _LITTLE else inputs
    out = _apply(_Rotated, y, K, bias, x, weight, g)
    return out if x is None else _holding(out)


def rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """y + e∘(y − bias) with e (c,) and bias (c,) over the channels of y (…, c, *s)."""
    e = _like(e, y)
    if few(y, spatial) or not torch.is_grad_enabled():
        return _rescaled(y, e, bias, spatial)
    return _apply(_Rescaled, y, e, bias, spatial)


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
    return _holding(_apply(_Decomposed, y, _like(h, y), _like(e, y), *factors, bias, *inputs, g))


def recoverable(y: Tensor, e: Tensor) -> bool:
    """Whether `decomposed_` of y is possible and worth it, and known without waiting for a GPU. y must be no view."""
    if y.numel() <= _LITTLE or not y.is_cpu or y._base is not None:
        return False
    return bool((e.detach() + 1).abs().min() >= _LEAST)


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
        B = _like(F if G is None else khatri_rao(F, G, 1), y)
        y.addcmul_(y, beside(e, g.spatial))
        if bias is not None:  # one more channel of ones: −e∘bias comes with the product
            h = pad(h, (0, 0) * g.spatial + (0, 1), value=1.0)
            B = torch.cat([B, -(e * _like(bias, e))[:, None]], 1)
        out = _add_pointwise_(y, h, B, g.spatial)
        ctx.geometry = g
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, e, F, G, bias, x, weight), spatial = grads, ctx.saved_tensors, ctx.geometry.spatial
        for_y, for_h, for_e, *for_factors, for_bias = ctx.needs_input_grad[:6]
        B = _like(F if G is None else khatri_rao(F, G, 1), g)
        gh, gB = _pointwise_gradients(g, h, B, spatial, for_h, for_e or any(for_factors))
        gy = torch.addcmul(g, g, beside(e, spatial)) if for_y else None
        total = over_channels(g, spatial) if bias is not None and (for_e or for_bias) else None
        ge = None
        if for_e:
            out = _output(ctx.held)
            sums: Tensor = over_channels(g, spatial, _called(ctx.geometry, x, weight, bias, g) if out is None else out)
            if bias is not None and total is not None:
                sums = sums - total * bias.to(sums.dtype)
            if out is not None:
                assert gB is not None
                sums = (sums - (gB * B).sum(1, dtype=sums.dtype)) / (1 + e.to(sums.dtype))
            ge = sums.to(e.dtype)
        pair = (gB if for_factors[0] else None, None)
        if G is not None:
            pair = (None, None) if gB is None else _pair_gradients(gB, F, G, 1, for_factors)
        gbias = None if bias is None or total is None or not for_bias else (-e * total).to(bias.dtype)
        return gy, gh, ge, *pair, gbias, None, None, None


class _Rotated(torch.autograd.Function):
    """y − bias = R⁻¹·(out − bias), R = I + K: with an orthogonal R, Σ g·(y − bias)ᵀ = Σ g·(out − bias)ᵀ·R."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, K: Tensor, bias: Tensor | None, x: Tensor | None, weight: Tensor | None, g: Geometry
    ) -> Tensor:
        out = _rotated(y, K, bias, g.spatial)
        ctx.geometry = g
        ctx.save_for_backward(y if x is None else None, K, bias, x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (y, K, bias, x, weight), spatial = grads, ctx.saved_tensors, ctx.geometry.spatial
        for_y, for_K, for_bias, *_ = ctx.needs_input_grad
        gy = _plus_blocks(g, K.mT, None, spatial) if for_y else None
        gK = gbias = out = None
        if for_K:
            if y is None:
                out = _output(ctx.held)
                y = _called(ctx.geometry, x, weight, bias, g) if out is None else out
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
        if gK is not None and out is not None:
            gK = torch.baddbmm(gK, gK, K)
        return gy, gK, gbias, None, None, None


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


def _holding(out: Tensor) -> Tensor:
    """out, which the function that made it finds again in backward."""
    if out.grad_fn is not None:
        cast(Any, out.grad_fn).held = Held(out)
    return out


def _output(held: Held) -> Tensor | None:
    """What is held, for gradients that nobody differentiates: it leads back to no graph."""
    return None if torch.is_grad_enabled() else held.value()


def _called(g: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The layer's output once more, in another's dtype."""
    bias = None if bias is None else bias.to(like.dtype)
    return g.call(x.to(like.dtype), weight.to(like.dtype), bias)


def _like(operand: Tensor, activation: Tensor) -> Tensor:
    return operand if operand.dtype == activation.dtype else operand.to(activation.dtype)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return cast("Callable[..., Tensor]", function.apply)(*arguments)


def _add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    v, r = B.shape
    if out.dim() == h.dim() == 2 and not spatial and out.shape[1] == v:  # rows as they are
        out.addmm_(h, B.mT)
    elif innermost(out, spatial):
        as_tokens(out, v, spatial).addmm_(as_tokens(h, r, spatial), B.mT)
    elif out.is_contiguous():
        planes = as_planes(out, v, spatial)
        planes.baddbmm_(B.expand(len(planes), -1, -1), as_planes(h, r, spatial))
    else:
        out.add_(from_tokens(as_tokens(h, r, spatial) @ B.mT, out.shape, spatial))
    return out


def _pointwise_gradients(
    g: Tensor, h: Tensor, B: Tensor, spatial: int, for_h: bool, for_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of h and B in `add_pointwise_`, where they are wanted, from that of its result."""
    v, r = B.shape
    if rowwise(g, spatial):
        rows = as_tokens(g, v, spatial)
        gh = from_tokens(rows @ B, h.shape, spatial) if for_h else None
        return gh, rows.mT @ as_tokens(h, r, spatial) if for_B else None
    planes = as_planes(g, v, spatial)
    gh = torch.bmm(B.mT.expand(len(planes), -1, -1), planes).view(h.shape) if for_h else None
    return gh, torch.bmm(planes, as_planes(h, r, spatial).mT).sum(0) if for_B else None


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
    if for_A and rowwise(x, g.spatial):
        gA = as_tokens(gh, r, g.spatial).mT @ as_tokens(x, n, g.spatial)
    elif for_A:
        gA = torch.bmm(as_planes(gh, r, g.spatial), as_planes(x, n, g.spatial).mT).sum(0)
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
        turned = y if bias is None else y - beside(_like(bias, y), spatial)
        out.view(len(K), -1, 1).baddbmm_(K, turned.reshape(len(K), -1, 1))
        return out
    start = None if bias is None else (K @ bias.to(K.dtype).view(len(K), -1, 1)).flatten()
    return _plus_blocks(y, K, start, spatial)


def _rescaled(y: Tensor, e: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    if bias is None:
        return torch.addcmul(y, y, beside(e, spatial))
    if y.dtype.itemsize < 4 or y.numel() < _SMALL:  # round once; of a few numbers, one operation less is faster
        return torch.addcmul(y, y - beside(_like(bias, y), spatial), beside(e, spatial))
    return torch.addcmul(y, y, beside(e, spatial)).sub_(beside(e * bias.to(e.dtype), spatial))


def _plus_blocks(y: Tensor, K: Tensor, start: Tensor | None, spatial: int) -> Tensor:
    """y − start + K·y, of the shape of y."""
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
