"""Dense: ΔW itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta.base import Delta


@dataclass(frozen=True, repr=False, eq=False)
class Dense(Delta):
    """ΔW = M (m, n)."""

    M: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.M.shape[0], self.M.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.M.dtype

    @property
    def device(self) -> torch.device:
        return self.M.device

    def dense(self) -> Tensor:
        return self.M

    def scaled(self, strength: float | Tensor) -> Dense:
        return Dense(self.M * strength)

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        return self.M[block]

    def dense_flops(self) -> int:
        return 0

    def __repr__(self) -> str:
        m, n = self.shape
        return f"M({m}×{n})"
