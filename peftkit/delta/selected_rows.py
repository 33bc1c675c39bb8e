"""SelectedRows: ΔW that is zero but for some rows, the structure of trained tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache
from peftkit.geometry import Geometry
from peftkit.kernels.cache import cached_without_grad


@dataclass(frozen=True, repr=False, eq=False)
class SelectedRows(Delta):
    """ΔW[index] = M, and zero elsewhere.

    Attributes:
        M: (k, n).
        index: The numbers of the rows, ascending, (k,); in a tuple, as it is no factor that a cast may change.
        height: m, the rows of ΔW.

    Example:
        >>> delta = pk.delta.SelectedRows(torch.ones(1, 3), (torch.tensor([2]),), 4)
        >>> delta.dense().sum(1)
        tensor([0., 0., 3., 0.])
    """

    factored: ClassVar[bool] = True

    M: Tensor
    index: tuple[Tensor]
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.M.shape[1]

    @property
    def rank(self) -> int:
        return self.M.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.M.dtype

    @property
    def device(self) -> torch.device:
        return self.M.device

    def dense(self) -> Tensor:
        return self._spread(self.M)

    def scaled(self, strength: float | Tensor) -> SelectedRows:
        return SelectedRows(self.M * strength, self.index, self.height)

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        if self.rank > min(self.shape):
            return super().low_rank_factors()
        return F.one_hot(self.index[0], self.height).to(self.dtype).mT, self.M

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        start, stop, step = block.indices(self.height)
        index = self.index[0]
        inside = (index >= start) & (index < stop) & ((index - start) % step == 0)
        out = self.M.new_zeros(len(range(start, stop, step)), self.M.shape[1])
        return out.index_copy(0, (index[inside] - start) // step, self.M[inside])

    def lookup(self, index: Tensor) -> Tensor:
        own = self.index[0]
        place = torch.searchsorted(own, index).clamp(max=len(own) - 1)
        found = (own[place] == index).to(self.dtype)
        return F.embedding(place, self.M) * found[..., None]

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        if g.spatial:
            return super().apply(x, wx, g)
        own = F.linear(x, self.M.to(x.dtype))
        return own.new_zeros(*own.shape[:-1], self.height).index_copy(-1, self.index[0], own)

    def inner(self, M: Tensor) -> Tensor:
        return (self.M * M[self.index[0]]).sum()

    def sqnorm(self) -> Tensor:
        return self.M.square().sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor:
        return self.sqnorm()

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del cache
        return self.inner(W), self.cheap_sqnorm

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return self._spread((self.M * M[self.index[0]]).sum(1)), self._spread(self.M.square().sum(1))

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return (self.M * M[self.index[0]]).sum(0), self.M.square().sum(0)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the rows (k, …) among zeros, (m, …)."""
        return values.new_zeros(self.height, *values.shape[1:]).index_copy(0, self.index[0], values)

    def apply_flops(self, outputs: int) -> int:
        return outputs * (2 * self.rank * self.shape[1] + self.height)

    def __repr__(self) -> str:
        return f"M({self.rank}×{self.shape[1]}) on {self.rank} of {self.height} rows"
