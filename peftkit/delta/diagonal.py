"""DiagonalLowRank: ΔW = L·diag(δ)·U with constant L and U, the structure of LoLDU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import WeightCache
from peftkit.delta.lowrank import LowRank
from peftkit.geometry import Geometry
from peftkit.kernels import fused


@dataclass(frozen=True, repr=False, eq=False)
class DiagonalLowRank(LowRank):
    """ΔW = B·A with B = L·diag(δ) and A = U, where L and U are constant and only δ is trained.

    Attributes:
        B: L·diag(δ), (m, r).
        A: U, (r, n).
        L: (m, r).
        change: δ (r,).
    """

    L: Tensor
    change: Tensor

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if g.groups > 1:
            return super().apply_onto(out, x, y, bias, g)
        h = g.contract(x, self.A)
        # δ acts here, so that no gradient of the size of L is made for it
        return fused.add_pointwise_(out, h * g.per_channel(fused.like(self.change, h)), self.L, g.spatial)

    def lookup(self, index: Tensor) -> Tensor:
        return (F.embedding(index, self.L) * self.change) @ self.A

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        # c_k = l_kᵀ·W·u_k and G = (LᵀL) ⊙ (UUᵀ): <ΔW, W> = δᵀc and ‖ΔW‖² = δᵀGδ, whatever m and n are
        constant = LowRank(self.L, self.A)
        c = cache("projections", lambda: (constant.projected(W) * self.L).sum(0))
        G = cache("gram", lambda: (self.L.mT @ self.L) * (self.A @ self.A.mT))
        return torch.dot(self.change, c), torch.dot(self.change, G @ self.change)
