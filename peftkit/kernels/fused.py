"""A product added to an activation in place, with its own backward.

Activations are the largest things a training step writes, and a write into fresh memory costs more than the arithmetic.
So the last product of a route adds into the layer's output. The functions can be differentiated twice: what their
backward reads are their inputs.

Activations are (…, c, *s), with `spatial` dimensions after their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkit.kernels.activations import as_planes, as_tokens, from_tokens, innermost, rowwise


def add_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    """Add B·h to out in place, for every run of r channels of h, and return out.

    Args:
        out: (…, a·v, *s), written over.
        h: (…, a·r, *s).
        B: (v, r).
        spatial: the number of dimensions after the channels.
    """
    h = like(h, out)
    if not torch.is_grad_enabled():
        return sum_pointwise_(out, h, like(B, out), spatial)
    return apply(_AddPointwise, out, h, like(B, out), spatial)


def khatri_rao(F: Tensor, G: Tensor, dim: int) -> Tensor:
    """Return every pair of runs along a dimension: F, G (m, r) -> (m, r²) for 1; (r, n), (r, n) -> (r², n) for 0."""
    return (F.unsqueeze(dim + 1) * G.unsqueeze(dim)).flatten(dim, dim + 1)


def add_pairs_(out: Tensor, h: Tensor, F: Tensor, G: Tensor, spatial: int) -> Tensor:
    """Add B·h to out in place, B = khatri_rao(F, G, 1), which backward makes again. F, G (m, r); h (…, r², *s)."""
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
    """Return the operand in the dtype of the activation."""
    return operand if operand.dtype == activation.dtype else operand.to(activation.dtype)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Call an autograd function, whose `apply` torch does not type."""
    return cast("Callable[..., Tensor]", function.apply)(*arguments)


def sum_pointwise_(out: Tensor, h: Tensor, B: Tensor, spatial: int) -> Tensor:
    """`add_pointwise_` without gradients, of one dtype."""
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
    """Return the gradients of h and B in `add_pointwise_`, where wanted, given the gradient g of its result."""
    v, r = B.shape
    if rowwise(g, spatial):
        rows = as_tokens(g, v, spatial)
        gh = from_tokens(rows @ B, h.shape, spatial) if for_h else None
        return gh, rows.mT @ as_tokens(h, r, spatial) if for_B else None
    planes = as_planes(g, v, spatial)
    gh = torch.bmm(B.mT.expand(len(planes), -1, -1), planes).view(h.shape) if for_h else None
    return gh, torch.bmm(planes, as_planes(h, r, spatial).mT).sum(0) if for_B else None


def pair_gradients(
    gradient: Tensor, F: Tensor, G: Tensor, dim: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of F and G in khatri_rao(F, G, dim), where wanted, given the gradient of the result."""
    shape = gradient.shape  # .unflatten has no rule for a batch of gradients
    pairs = gradient.to(F.dtype).reshape(*shape[:dim], F.shape[dim], G.shape[dim], *shape[dim + 1 :])
    gF = (pairs * G.unsqueeze(dim)).sum(dim + 1) if wanted[0] else None
    return gF, (pairs * F.unsqueeze(dim + 1)).sum(dim) if wanted[1] else None
