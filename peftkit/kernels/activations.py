"""An activation as matrices: where its channels are in memory, and products of few or many of its numbers.

The channels of an activation (…, c, *s) stand before `spatial` dimensions. In memory they are innermost, as in a Linear
and in channels_last: `as_tokens` (T, c); or each is a plane: `as_planes` (batch, c, S).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkit.kernels.blocks import accumulation_dtype, row_blocks

#: elements of a block of products: with those of `blocks.BLOCK`, which leave the second level of cache, summing them
#: takes 1.3 to 2.4 times as long
_BLOCK = 1 << 16

#: elements of an activation up to which a pass over it costs less than a function of Python's in the graph: with
#: 2^18, a step of a 320×320 LoRA takes 1.5 in place of 1.9 times the frozen layer's at 64 tokens; with 2^20, 1.47 in
#: place of 1.35 times at 2048
_FEW = 1 << 18

#: and up to which a processor multiplies 16-bit numbers more slowly than in 32 bits, casts included: each of oneDNN's
#: products takes 15 µs whatever its size, MKL's 5. A bf16 step of the same LoRA takes 2.5 in place of 3.2 times at 64
#: tokens; with 2^17, 3.4 in place of 2.9 times at 256
_FEWER = 1 << 16


def innermost(x: Tensor, spatial: int) -> bool:
    """Whether the channels of one position are neighbours in memory, and everything is dense."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).is_contiguous()


def rowwise(x: Tensor, spatial: int) -> bool:
    """Whether x is best read as tokens, which without spatial dimensions it is however it lies in memory."""
    return not spatial or innermost(x, spatial)


def as_tokens(x: Tensor, run: int, spatial: int) -> Tensor:
    """(…, a·run, *s) -> (T·a, run)."""
    return (x.movedim(-1 - spatial, -1) if spatial else x).reshape(-1, run)


def from_tokens(rows: Tensor, shape: torch.Size, spatial: int) -> Tensor:
    """The inverse of `as_tokens`: (T·a, run) -> shape."""
    if not spatial:
        return rows.view(shape)
    channel = len(shape) - 1 - spatial
    return rows.view(*shape[:channel], *shape[channel + 1 :], shape[channel]).movedim(-1, channel)


def as_planes(x: Tensor, run: int, spatial: int) -> Tensor:
    """(…, a·run, *s) -> (batch·a, run, S)."""
    return x.reshape(-1, run, x.shape[-spatial:].numel() if spatial else 1)


def as_blocks(x: Tensor, K: Tensor, spatial: int) -> Tensor:
    """(…, k·b, *s) -> (k, T, b), of innermost channels a view."""
    return as_tokens(x, K.shape[0] * K.shape[-1], spatial).unflatten(1, (K.shape[0], -1)).transpose(0, 1)


def beside(v: Tensor, spatial: int) -> Tensor:
    """A vector over channels, shaped to broadcast against an activation."""
    return v[(...,) + (None,) * spatial] if spatial else v


def over_channels(g: Tensor, spatial: int, y: Tensor | None = None) -> Tensor:
    """Σ g, or Σ g∘y, over all but the channels, (c,), in at least fp32 and without another activation."""
    dtype, c = accumulation_dtype(g.dtype), g.shape[-1 - spatial]
    if rowwise(g, spatial):
        rows = as_tokens(g, c, spatial)
        parts = [block.sum(0) for block in _products(rows, None if y is None else as_tokens(y, c, spatial), dtype)]
        return torch.stack(parts).sum(0) if parts else rows.new_zeros(c, dtype=dtype)
    channels = as_planes(g, c, spatial).transpose(0, 1)
    others = None if y is None else as_planes(y, c, spatial).transpose(0, 1)
    return torch.cat([block.sum((1, 2)) for block in _products(channels, others, dtype)])


def _products(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """x∘y, or x, some entries of the first dimension at a time: a sum of 16-bit numbers would widen them all first."""
    blocks = row_blocks(len(x), x[:1].numel(), size=_BLOCK if y is not None or x.dtype != dtype else max(1, x.numel()))
    return (x[block].to(dtype) if y is None else x[block].to(dtype) * y[block].to(dtype) for block in blocks)


def few(x: Tensor, spatial: int) -> bool:
    """Whether x is few numbers, in rows: torch's own graph of their products is then the cheaper one."""
    return x.dim() == 2 and not spatial and x.numel() <= _FEW


def widened(x: Tensor, spatial: int) -> Tensor:
    """x in 32 bits where its products are then faster, and lose less: of few 16-bit numbers on a processor."""
    narrow = x.itemsize < 4 and x.is_cpu and few(x, spatial) and x.numel() <= _FEWER
    return x.float() if narrow else x
