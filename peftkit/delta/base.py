"""Delta: a weight change ΔW (m, n) held as factors.

`dense` is the definition. Everything else has a default derived from it, which a structure overrides where its
factors give the same number for less; the tests hold every override against the default.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftkit.geometry import Geometry
from peftkit.kernels import fused
from peftkit.kernels.blocks import BLOCK, Workspace, accumulation_dtype, row_blocks, tiles
from peftkit.kernels.cache import cached_without_grad

#: what touching one element of a fresh matrix costs, in floating point operations of a matrix product
ELEMENT = 40
_SMALL = 1 << 14  # elements that nobody minds: 64 KiB of fp32


class WeightCache:
    """What follows from W, or from the constants of an adapter, alone: made once and kept for the next time."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is known under that name, made if it is not."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with what it builds on the way thrown away and built again for backward."""
    if not torch.is_grad_enabled():
        return function(x)
    return cast(Tensor, checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))


def total(parts: list[Tensor]) -> Tensor:
    """The sum of scalars."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class Delta(ABC):
    """ΔW (m, n). Immutable: every method returns something new and writes nothing."""

    #: whether `apply` reads wx, the layer's output without bias
    reads_output: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """ΔW itself, (m, n), in the dtype of its factors."""

    @abstractmethod
    def scaled(self, strength: float | Tensor) -> Delta:
        """strength·ΔW, with the factor folded in where it is cheapest. strength: a number or a 0-d tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.dense().dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.dense().device

    # -- blocks of rows ---------------------------------------------------------------------------------------

    @property
    def row_multiple(self) -> int:
        """Blocks of rows must start at multiples of this to be computed alone; m when they cannot be."""
        return self.shape[0]

    def rows(self, block: slice) -> Tensor:
        """dense()[block], without building the rest. block: with a step too, where `row_multiple` is 1."""
        return self.dense()[block]

    def rows_(self, block: slice, out: Tensor, space: Workspace) -> None:
        """Write `rows` into out, which has the dtype of the factors. For no gradients."""
        del space
        out.copy_(self.rows(block))

    def add_rows_(self, block: slice, W: Tensor, space: Workspace) -> None:
        """W += `rows`, in place. W: the rows `block`, few or many, of a weight: perhaps of the base that ΔW reads."""
        for part in row_blocks(W.shape[0], W.shape[1], self.row_multiple):
            here = W[part]
            out = space("delta", (here.shape[0], here.shape[1]), here, self.dtype)
            self.rows_(slice(block.start + part.start, block.start + part.stop), out, space)
            here.add_(out)

    def dense_blockwise(self) -> Tensor:
        """`dense` from its rows, block by block: nothing of its size is made beside it. For no gradients."""
        out, space = torch.empty(self.shape, dtype=self.dtype, device=self.device), Workspace()
        size = 4 * BLOCK // out.itemsize  # a block is of so many bytes
        for block in row_blocks(*self.shape, self.row_multiple, size):
            self.rows_(block, out[block], space)
        return out

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """dense()[rows, columns], for where even the rows that belong together are too many numbers."""
        return self.rows(rows)[:, columns]

    # -- products ---------------------------------------------------------------------------------------------

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        """ΔW·x as layer g applies its weight. x: the layer's input; wx: W·x without bias if `reads_output`."""
        del wx
        return recomputed(lambda x: g.run(x, self.dense()), x)

    def ahead(self, x: Tensor, g: Geometry) -> tuple[Tensor, Tensor | None]:
        """The x that the layer itself must be called with, and what `_fused` needs of x, made before that call."""
        del g
        return x, None

    def onto(
        self,
        out: Tensor,
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        g: Geometry,
        h: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """out + ΔW·x, as `apply`, in the dtype of out. y: the layer's output, with its bias (m,); h: from `ahead`.

        Without `reads_output`, out may be overwritten; with it, out is y or what others have added to it. weight: the
        layer's, in its own shape, where this is its only ΔW: out is y, nobody else's, and may be overwritten anyway.
        """
        if weight is not None:
            alone = self._alone(x, h, y, bias, weight, g)
            if alone is not None:
                return alone
        done = self._fused(out, h, y, bias, g) if h is not None or fused.eager() else None
        if done is not None:
            return done
        wx = None
        if self.reads_output:
            wx = y if bias is None else y - g.per_channel(bias.to(y.dtype))
        return out + self.apply(x, wx, g).to(out.dtype)

    def _fused(self, out: Tensor, h: Tensor | None, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor | None:
        """`onto` in fewer passes over memory; None where there is no such way."""
        return None

    def _alone(
        self, x: Tensor, h: Tensor | None, y: Tensor, bias: Tensor | None, weight: Tensor, g: Geometry
    ) -> Tensor | None:
        """`onto` y, which is then not kept for backward; None where there is no such way."""
        return None

    def inner(self, M: Tensor) -> Tensor:
        """<ΔW, M>_F, a scalar. M (m, n)."""
        return (self.dense() * M).sum()

    def sqnorm(self) -> Tensor:
        """‖ΔW‖_F², a scalar."""
        return self.dense().square().sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor | None:
        """‖ΔW‖_F², a scalar, where it takes far less than building ΔW; None elsewhere."""
        return None

    def max_abs_bound(self, most: Tensor) -> Tensor:
        """A number that no |ΔW_ij| exceeds, a scalar. most: the largest |W_ij| of the weight that ΔW is of."""
        del most
        square = self.cheap_sqnorm
        return (self.sqnorm() if square is None else square).clamp(min=0).sqrt()

    def inner_and_sqnorm(self, W: Tensor, known: WeightCache) -> tuple[Tensor, Tensor]:
        """<ΔW, W>_F and ‖ΔW‖_F², scalars. W (m, n): the weight that ΔW is of; known: what is kept of it."""
        del known
        inner, square = [], []
        m, n = self.shape
        size = min(BLOCK, max(m * n // 4, _SMALL))  # never a matrix of W's size, however small W is
        for rows, columns in tiles(m, n, self.row_multiple, size):
            whole = columns.stop - columns.start == self.shape[1]
            tile = (self.rows(rows) if whole else self.tile(rows, columns)).reshape(-1)
            inner.append(torch.dot(tile, W[rows, columns].to(tile.dtype).reshape(-1)))
            square.append(torch.dot(tile, tile))
        return total(inner), total(square)

    def upcast(self) -> Delta:
        """The same ΔW with its factors in at least fp32. W itself, where it is one of them, stays as it is."""
        if self.dtype.itemsize >= 4:
            return self
        return self.mapped(lambda name, factor: factor if name == "W" else factor.to(accumulation_dtype(factor.dtype)))

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> Delta:
        """The same structure with function(name, factor) in place of every factor, inner ones too."""
        new: dict[str, Any] = {}
        for field in dataclasses.fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Delta):
                new[field.name] = value.mapped(function)
            elif isinstance(value, Tensor):
                new[field.name] = function(field.name, value)
        return dataclasses.replace(cast(Any, self), **new)

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Per row i: <M_i, ΔW_i> and ‖ΔW_i‖², each (m,). M (m, n)."""
        products, squares = [], []
        for block in row_blocks(*self.shape, self.row_multiple):
            rows = self.rows(block)
            products.append((rows * M[block].to(rows.dtype)).sum(1))
            squares.append(rows.square().sum(1))
        return torch.cat(products), torch.cat(squares)

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Per column j: <M_j, ΔW_j> and ‖ΔW_j‖², each (n,). M (m, n)."""
        dense = self.dense()
        return (dense * M).sum(0), dense.square().sum(0)

    def added_to(self, M: Tensor, strength: float = 1.0) -> Tensor:
        """M + strength·ΔW, accumulated in at least fp32 and rounded once to M's dtype. M (m, n)."""
        acc = accumulation_dtype(M.dtype)
        return (M.to(acc) + strength * self.dense().to(acc)).to(M.dtype)

    # -- kernels ----------------------------------------------------------------------------------------------

    def tiled(self) -> tuple[str, list[Tensor]] | None:
        """The class and the tensors of the tile function of peftkit/kernels/triton/tiles.py that makes this ΔW."""
        return None

    # -- costs, in floating point operations ------------------------------------------------------------------

    def apply_flops(self, outputs: int) -> int:
        """Of `apply` over that many output positions; the default builds ΔW and runs it."""
        return self.dense_flops() + 2 * outputs * self.shape[0] * self.shape[1]

    def dense_flops(self) -> int:
        """Of `dense`."""
        return self.shape[0] * self.shape[1]
