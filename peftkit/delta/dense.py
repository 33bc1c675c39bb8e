"""Dense: ΔW itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache


@dataclass(frozen=True, repr=False, eq=False)
class Dense(Delta):
    """ΔW = λ·M, multiplied when its rows are read.

    Attributes:
        M: (m, n).
        strength: λ, a number or a 0-d tensor.
    """

    structure: ClassVar[str] = "full"

    M: Tensor
    strength: float | Tensor = 1.0

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
        return self.M * self.strength

    def folded(self) -> Dense:
        return Dense(self.dense())

    def scaled(self, strength: float | Tensor) -> Dense:
        return Dense(self.M, self.strength * strength)

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        return self.M[block] * self.strength

    def rows_(self, block: slice, out: Tensor) -> None:
        torch.mul(self.M[block], self.strength, out=out)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return self.M[rows, columns] * self.strength

    def lookup(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.M) * self.strength

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        if self.strength == 1.0 and W.dtype == self.dtype:  # one pass over what is there
            flat = self.M.reshape(-1)
            return torch.dot(flat, W.reshape(-1)), torch.dot(flat, flat)
        return super().inner_and_sqnorm(W, cache)

    def dense_flops(self) -> int:
        return self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        m, n = self.shape
        return f"M({m}×{n})"
