"""Activations as matrices: how their channels lie in memory, without a copy where the memory allows.

The channels of an activation (…, c, *s) stand before `spatial` dimensions. In memory they are innermost, as in a Linear
and in channels_last: `as_tokens`, "… c *s -> (… *s) c"; or each is a plane: `as_planes`, "… c *s -> (…) c (*s)".
These run at every call of a layer and stay plain torch: einops.rearrange takes 2.5 µs more a call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkit.kernels.blocks import accumulation_dtype, row_blocks

#: elements of a block of products: with as many as `blocks.BLOCK`, which leave the second level of cache, summing
#: takes 1.3 to 2.4 times as long
_BLOCK = 1 << 16


def innermost(x: Tensor, spatial: int) -> bool:
    """Return whether the channels of one position are neighbours in memory, and everything is dense."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).is_contiguous()


def rowwise(x: Tensor, spatial: int) -> bool:
    """Return whether x is best read as tokens; without spatial dimensions it always is."""
    return not spatial or innermost(x, spatial)


def as_tokens(x: Tensor, run: int, spatial: int) -> Tensor:
    """Rearrange "… (a run) *s -> (… *s a) run"."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).reshape(-1, run)


def from_tokens(rows: Tensor, shape: torch.Size, spatial: int) -> Tensor:
    """Rearrange "(… *s a) run -> … (a run) *s", the inverse of `as_tokens`, to an activation of that shape."""
    if not spatial:
        return rows.view(shape)
    channel = len(shape) - 1 - spatial
    return rows.view(*shape[:channel], *shape[channel + 1 :], shape[channel]).movedim(-1, channel)


def as_planes(x: Tensor, run: int, spatial: int) -> Tensor:
    """Rearrange "… (a run) *s -> (… a) run (*s)"."""
    return x.reshape(-1, run, x.shape[-spatial:].numel() if spatial else 1)


def as_blocks(x: Tensor, K: Tensor, spatial: int) -> Tensor:
    """Rearrange "… (k b) *s -> k (… *s) b" for K (k, b, b); of innermost channels a view."""
    rows = as_tokens(x, K.shape[0] * K.shape[-1], spatial)
    return rows.view(len(rows), K.shape[0], K.shape[-1]).transpose(0, 1)


def beside(v: Tensor, spatial: int) -> Tensor:
    """Return a vector over channels (c,), shaped to broadcast against an activation."""
    return v[(...,) + (None,) * spatial] if spatial else v


def over_channels(g: Tensor, spatial: int, y: Tensor | None = None) -> Tensor:
    """Return Σ g, or Σ g∘y, over all but the channels, (c,), in at least fp32 and without another activation."""
    dtype, c = accumulation_dtype(g.dtype), g.shape[-1 - spatial]
    if rowwise(g, spatial):
        rows = as_tokens(g, c, spatial)
        parts = [block.sum(0) for block in _products(rows, None if y is None else as_tokens(y, c, spatial), dtype)]
        return torch.stack(parts).sum(0) if parts else rows.new_zeros(c, dtype=dtype)
    channels = as_planes(g, c, spatial).transpose(0, 1)
    others = None if y is None else as_planes(y, c, spatial).transpose(0, 1)
    return torch.cat([block.sum((1, 2)) for block in _products(channels, others, dtype)])


def _products(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """x∘y, or x, some entries of the first dimension at a time: a sum of 16-bit numbers would upcast them all first."""
    blocks = row_blocks(len(x), x[:1].numel(), size=_BLOCK if y is not None or x.dtype != dtype else max(1, x.numel()))
    return (x[block].to(dtype) if y is None else x[block].to(dtype) * y[block].to(dtype) for block in blocks)
