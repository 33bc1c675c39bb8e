"""Decomposed: ΔW = t·(W + V) − W with a magnitude t for every row (or input channel), the structure of DoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache
from peftkit.geometry import Geometry
from peftkit.kernels import outputs
from peftkit.kernels.blocks import column_dots, row_blocks, row_dots
from peftkit.kernels.cache import cached_without_grad
from peftkit.kernels.torch_private import eager


@dataclass(frozen=True, repr=False, eq=False)
class Decomposed(Delta):
    """ΔW = e·W + f·V, held without cancellation: e = t − 1 and f = t, so that t = 1 leaves exactly V.

    Attributes:
        e: t − 1, (m,) over rows, or (n,) over columns.
        f: t, of the same shape.
        W: The base weight (m, n).
        V: The inner ΔW (m, n).
        columns: Whether e and f scale columns.
        known: ‖W_i‖², <W_i, V_i> and ‖V_i‖² per row (or column), where they were computed for t.
    """

    e: Tensor
    f: Tensor
    W: Tensor
    V: Delta
    columns: bool = False
    known: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return not self.columns or self.V.reads_output

    @property
    def shape(self) -> tuple[int, int]:
        return self.V.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    @property
    def device(self) -> torch.device:
        return self.e.device

    def _along(self, v: Tensor, block: slice | None = None) -> Tensor:
        rows = v if block is None else v[block]
        return v if self.columns else rows[:, None]

    def dense(self) -> Tensor:
        if torch.is_grad_enabled() or not eager():
            scaled = self._along(self.f) * self.V.dense()
            return torch.addcmul(scaled, self.W.to(scaled.dtype), self._along(self.e))
        return self.dense_blockwise()

    def scaled(self, strength: float | Tensor) -> Decomposed:
        return Decomposed(self.e * strength, self.f * strength, self.W, self.V, self.columns, self.known)

    @property
    def row_multiple(self) -> int:
        return self.V.row_multiple

    def rows(self, block: slice) -> Tensor:
        scaled = self._along(self.f, block) * self.V.rows(block)
        return torch.addcmul(scaled, self.W[block].to(scaled.dtype), self._along(self.e, block))

    def rows_(self, block: slice, out: Tensor) -> None:
        e = self._along(self.e, block).to(out.dtype)  # operands of several dtypes would be copied
        self.V.rows_(block, out)
        out.mul_(self._along(self.f, block)).addcmul_(self.W[block].to(out.dtype), e)

    def add_rows_(self, block: slice, W: Tensor) -> None:
        V = self._scaled_inner
        if V is None or W.dtype != self.dtype:
            return super().add_rows_(block, W)
        for part in row_blocks(W.shape[0], W.shape[1]):
            rows = slice(block.start + part.start, block.start + part.stop)
            W[part].addcmul_(self.W[rows].to(W.dtype), self.e[rows, None])
            V.add_rows_(rows, W[part])  # which does not read the base, changed by now
        return None

    @cached_without_grad
    def _scaled_inner(self) -> Delta | None:
        """diag(f)·V in the structure of V; None where its factors cannot hold f."""
        return None if self.columns else self.V.rows_rescaled(self.f)

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        if not self.columns:
            assert wx is not None
            inner = self.V.apply(x, wx, g)
            return g.per_channel(self.e.to(wx.dtype)) * wx + g.per_channel(self.f.to(inner.dtype)) * inner
        # Columns of one input channel share their scale, so it may act on the input
        e, f = (v[:: g.shape.positions].repeat(g.groups).to(x.dtype) for v in (self.e, self.f))
        inner = self.V.apply(g.per_channel(f) * x, wx, g)
        return g.run(g.per_channel(e) * x, self.W) + inner

    def lookup(self, index: Tensor) -> Tensor:
        V = self.V.lookup(index)
        e, f = (v if self.columns else F.embedding(index, v[:, None]) for v in (self.e, self.f))
        return torch.addcmul(f * V, F.embedding(index, self.W).to(V.dtype), e)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        V = self._scaled_inner
        if V is None or out is not y:
            return super().apply_onto(out, x, y, bias, g)
        # The magnitudes of V go into its factors: what has the size of the output is written once
        return V.apply_onto(outputs.rescaled(y, self.e, bias, g.spatial), x, y, bias, g)

    def inner(self, M: Tensor) -> Tensor:
        along = self.V.column_moments if self.columns else self.V.moments
        return (self.e * self._dots(self.W, M)).sum() + (self.f * along(M)[0]).sum()

    def sqnorm(self) -> Tensor:
        own, cross, squares = self._moments()
        # ‖e·w + f·v‖² = e²w² + 2ef<w, v> + f²v², row by row
        return (self.e.square() * own + 2 * self.e * self.f * cross + self.f.square() * squares).sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor | None:
        return None if self.known is None else self.sqnorm()

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        return self.e.abs().max() * max_abs_weight + self.f.abs().max() * self.V.max_abs_bound(max_abs_weight)

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del W, cache
        own, cross, _ = self._moments()
        return (self.e * own + self.f * cross).sum(), self.sqnorm()

    def upcast(self) -> Delta:
        wide = super().upcast()  # and what was known in a narrow dtype is not known well enough
        return wide if wide is self else replace(cast(Decomposed, wide), known=None)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖W_i‖², <W_i, V_i> and ‖V_i‖² per row (or column)."""
        if self.known is not None:
            return self.known
        along = self.V.column_moments if self.columns else self.V.moments
        return self._dots(self.W, self.W), *along(self.W)

    def _dots(self, M: Tensor, N: Tensor) -> Tensor:
        """<M_i, N_i> per row (or column), accumulated in the dtype of the factors."""
        return (column_dots if self.columns else row_dots)(M, N, self.dtype)

    def apply_flops(self, outputs: int) -> int:
        m, n = self.shape
        return self.V.apply_flops(outputs) + outputs * (2 * m * n if self.columns else 3 * m)

    def dense_flops(self) -> int:
        return self.V.dense_flops() + 3 * self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        return f"t·(W + {self.V!r}) − W over {'columns' if self.columns else 'rows'}"
