"""y + ΔW·x in as few passes over memory as it takes.

Activations are the largest things a training step writes, and a write into fresh memory costs more than the arithmetic.
So the last product of a route adds into what is there, and backward makes one new activation at most. Each function can
be differentiated twice: what its backward reads are its inputs.

Activations are (…, c, *s), with `spatial` dimensions after their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.geometry import Geometry
from peftkit.kernels.activations import as_planes, as_tokens, few, from_tokens, innermost, rowwise, widened

#: asked at every call of a layer, where looking them up would cost as much as asking
_compiling, _transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_observers = torch._C._len_torch_dispatch_stack


def eager() -> bool:
    """Whether operations run as they are written: to a tracer or a transform, these are opaque or in its way."""
    return not (_compiling() or _transforming() or _observers())


def transformed() -> bool:
    """Whether a transform of torch.func is at work, which knows nothing of functions with their own backward."""
    return not _compiling() and _transforming()


def add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    """out += B on every run of r channels of h. out (…, a·v, *s); h (…, a·r, *s); B (v, r)."""
    training = torch.is_grad_enabled()
    little = (training or h.dtype != out.dtype) and few(out, spatial)
    if little and (h.itemsize > out.itemsize or out.shape[1] != B.shape[0]):
        return out.add_(like(as_tokens(h, B.shape[1], 0) @ like(B, h).mT, out).view(out.shape))
    h, B = like(h, out), like(B, out)
    if little or not training:
        return sum_pointwise_(out, h, B, spatial)
    return apply(_AddPointwise, out, h, B, spatial)


def khatri_rao(F: Tensor, G: Tensor, dim: int) -> Tensor:
    """Every pair of runs along a dimension: F (m, r), G (m, r) -> (m, r²) for 1; (r, n), (r, n) -> (r², n) for 0."""
    return (F.unsqueeze(dim + 1) * G.unsqueeze(dim)).flatten(dim, dim + 1)


def contracted(x: Tensor, F: Tensor, G: Tensor | None, g: Geometry) -> tuple[Tensor, Tensor]:
    """x for the layer itself, and g.contract(x, A) with A = F, or khatri_rao(F, G, 0), which waits for no backward.

    The gradient that comes back to the x that is returned is added to in place, so that backward makes no second one
    of its size: whoever reads it must make that gradient anew, as products do. F, G (r, c·K); g ungrouped.
    """
    # A constant factor needs no x in backward, nor few numbers a function of their own
    plain = not torch.is_grad_enabled() or (
        G is None and (few(x, g.spatial) or not (x.requires_grad and F.requires_grad))
    )
    if plain or g.transposed or not g.direct:
        return x, g.contract(widened(x, g.spatial), F if G is None else khatri_rao(F, G, 0))
    passed, h = cast("Callable[..., tuple[Tensor, Tensor]]", _Contracted.apply)(x, F, G, g)
    return passed if x.requires_grad else x, h


def add_pairs_(out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
    """`add_pointwise_` with B = khatri_rao(F, G, 1), which does not wait for backward. F, G (m, r); h (…, r², *s)."""
    return apply(_AddPairs, out, like(h, out), F, G, spatial)


class _AddPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(h, B)
        ctx.spatial = spatial
        return sum_pointwise_(out, h, B, spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, B), (_, for_h, for_B, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        return g, *pointwise_gradients(g, h, B, ctx.spatial, for_h, for_B), None


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
        A = like(F if G is None else khatri_rao(F, G, 0), gh)
        gx, gA = _contraction_gradients(gx, gh, x, A, ctx.geometry, for_x, any(for_pair))
        pair = (gA, None) if G is None or gA is None else pair_gradients(gA, F, G, 0, for_pair)
        return gx, *pair, None


class _AddPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(h, F, G)
        ctx.spatial = spatial
        return sum_pointwise_(out, h, like(khatri_rao(F, G, 1), out), spatial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, F, G), (_, for_h, *for_pairs, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        B = like(khatri_rao(F, G, 1), g)
        gh, gB = pointwise_gradients(g, h, B, ctx.spatial, for_h, any(for_pairs))
        pair = (None, None) if gB is None else pair_gradients(gB, F, G, 1, for_pairs)
        return g, gh, *pair, None


def like(operand: Tensor, activation: Tensor) -> Tensor:
    return operand if operand.dtype == activation.dtype else operand.to(activation.dtype)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return cast("Callable[..., Tensor]", function.apply)(*arguments)


def sum_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
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


def pointwise_gradients(
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
    x, (r, n), gA = like(x, gh), A.shape, None
    if for_A and rowwise(x, g.spatial):
        gA = as_tokens(gh, r, g.spatial).mT @ as_tokens(x, n, g.spatial)
    elif for_A:
        gA = torch.bmm(as_planes(gh, r, g.spatial), as_planes(x, n, g.spatial).mT).sum(0)
    return sum_pointwise_(gx, gh, A.mT, g.spatial), gA


def pair_gradients(
    gradient: Tensor, F: Tensor, G: Tensor, dim: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of F and G, where they are wanted, from that of khatri_rao(F, G, dim)."""
    pairs = gradient.to(F.dtype).unflatten(dim, (F.shape[dim], G.shape[dim]))
    gF = (pairs * G.unsqueeze(dim)).sum(dim + 1) if wanted[0] else None
    return gF, (pairs * F.unsqueeze(dim + 1)).sum(dim) if wanted[1] else None
