"""ChannelScale: ΔW = diag(e)·W or W·diag(e), the structure of (IA)³."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache
from peftkit.geometry import Geometry
from peftkit.kernels import outputs
from peftkit.kernels.blocks import column_dots, column_sqnorms, row_dots, row_sqnorms


@dataclass(frozen=True, repr=False, eq=False)
class ChannelScale(Delta):
    """ΔW = diag(e)·W over rows, or W·diag(e) over columns.

    Attributes:
        e: (m,) over rows; or (n,) over columns, equal on the kernel positions of one input channel.
        W: The base weight (m, n).
        columns: Whether e scales columns.
    """

    e: Tensor
    W: Tensor
    columns: bool = False

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return not self.columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.e.dtype

    @property
    def device(self) -> torch.device:
        return self.e.device

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.shape[0]))

    def scaled(self, strength: float | Tensor) -> ChannelScale:
        return ChannelScale(self.e * strength, self.W, self.columns)

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        return (self.e if self.columns else self.e[block, None]) * self.W[block].to(self.dtype)

    def rows_(self, block: slice, out: Tensor) -> None:
        out.copy_(self.W[block]).mul_(self.e if self.columns else self.e[block, None])

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        if not self.columns:
            assert wx is not None
            return g.per_channel(self.e.to(wx.dtype)) * wx
        e = self.e[:: g.shape.positions].repeat(g.groups).to(x.dtype)
        return g.run(g.per_channel(e) * x, self.W)

    def lookup(self, index: Tensor) -> Tensor:
        e = self.e if self.columns else F.embedding(index, self.e[:, None])
        return e * F.embedding(index, self.W).to(self.dtype)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if self.columns or out is not y:
            return super().apply_onto(out, x, y, bias, g)
        return outputs.rescaled(y, self.e, bias, g.spatial)

    def inner(self, M: Tensor) -> Tensor:
        return (self.e * self._dots(M)).sum()

    def sqnorm(self) -> Tensor:
        squares = self._squares(self.W)
        return (self.e.square() * squares.to(self.dtype)).sum()

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        return self.e.abs().max() * max_abs_weight

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        squares = cache(f"columns {self.columns}", lambda: self._squares(W).to(self.dtype))
        return (self.e * squares).sum(), (self.e.square() * squares).sum()

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        if self.columns:
            return super().moments(M)
        return self.e * self._dots(M), self.e.square() * self._dots(self.W)

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return ChannelScale(self.e, self.W.t(), not self.columns).moments(M.t())

    def _dots(self, M: Tensor) -> Tensor:
        """<W_i, M_i> per row (or column), accumulated in the dtype of e."""
        return (column_dots if self.columns else row_dots)(self.W, M, self.dtype)

    def _squares(self, M: Tensor) -> Tensor:
        """‖M_i‖² per row (or column)."""
        return (column_sqnorms if self.columns else row_sqnorms)(M)

    def apply_flops(self, outputs: int) -> int:
        return outputs * (2 * self.shape[0] * self.shape[1] if self.columns else self.shape[0])

    def __repr__(self) -> str:
        return "W·diag(e)" if self.columns else "diag(e)·W"
