"""LowRank: ΔW = B·A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache, identity_factors
from peftkit.geometry import Geometry
from peftkit.kernels import fused
from peftkit.kernels.blocks import row_blocks
from peftkit.kernels.cache import cached_without_grad


@dataclass(frozen=True, repr=False, eq=False)
class LowRank(Delta):
    """ΔW = B·A, of rank at most r.

    Attributes:
        B: (m, r).
        A: (r, n).

    Example:
        >>> delta = pk.delta.LowRank(torch.ones(3, 2), torch.ones(2, 4))
        >>> delta.shape, delta.sqnorm(), delta.inner(torch.ones(3, 4))
        ((3, 4), tensor(48.), tensor(24.))
    """

    structure: ClassVar[str] = "lora"
    factored: ClassVar[bool] = True

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def dense(self) -> Tensor:
        return self.B @ self.A

    def scaled(self, strength: float | Tensor) -> LowRank:
        return LowRank(self.B * strength, self.A)

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        return self.B[block] @ self.A

    def rows_(self, block: slice, out: Tensor) -> None:
        torch.mm(self.B[block], self.A, out=out)

    def add_rows_(self, block: slice, W: Tensor) -> None:
        if W.dtype == self.dtype:
            W.addmm_(self.B[block], self.A)
        else:
            super().add_rows_(block, W)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return self.B[rows] @ self.A[:, columns]

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        return (self.B, self.A) if self.rank <= min(self.shape) else identity_factors(self.dense())

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"rank": self.rank}, {"up": self.B, "down": self.A}

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        del wx
        return g.expand(g.contract(x, self.A), self.B)

    def lookup(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.B) @ self.A

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if g.groups > 1:
            return super().apply_onto(out, x, y, bias, g)
        return fused.add_pointwise_(out, g.contract(x, self.A), self.B, g.spatial)

    def rows_rescaled(self, f: Tensor) -> LowRank:
        return LowRank((self.B * f[:, None]).to(self.dtype), self.A)

    def inner(self, M: Tensor) -> Tensor:
        return (self.projected(M) * self.B).sum()

    def sqnorm(self) -> Tensor:
        return ((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor:
        # Ranks may cancel: the Gram matrices are small, and take float64 where there is any
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return LowRank(self.B.to(wide), self.A.to(wide)).sqnorm()

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return (self.projected(M) * self.B).sum(1), ((self.B @ (self.A @ self.A.t())) * self.B).sum(1)

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return LowRank(self.A.t(), self.B.t()).moments(M.t())

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del cache
        return self.inner(W), self.cheap_sqnorm

    def projected(self, M: Tensor) -> Tensor:
        """Return M·Aᵀ (m, r), without a copy of M in another dtype. M (m, n)."""
        if M.dtype == self.dtype:
            return M @ self.A.t()
        if type(M) not in (Tensor, torch.nn.Parameter):  # a quantised W is cast where it is read
            return M.to(self.dtype) @ self.A.t()
        return torch.cat([M[rows].to(self.dtype) @ self.A.t() for rows in row_blocks(*M.shape)])

    def apply_flops(self, outputs: int) -> int:
        return 2 * outputs * self.rank * sum(self.shape)

    def dense_flops(self) -> int:
        return 2 * self.rank * self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        m, n = self.shape
        return f"B({m}×{self.rank})·A({self.rank}×{n})"
