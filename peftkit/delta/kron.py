"""Kron: ΔW = C ⊗ D, the structure of KronA and LoKr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache, identity_factors
from peftkit.geometry import Geometry
from peftkit.kernels import fused
from peftkit.kernels.blocks import row_blocks
from peftkit.kernels.cache import cached_without_grad


@dataclass(frozen=True, repr=False, eq=False)
class Kron(Delta):
    """ΔW = C ⊗ D (a·b, c·d), where D is whole or a product left·right.

    ΔW_ij = C[i // b, j // d]·D[i % b, j % d].

    Attributes:
        C: (a, c).
        right: (r, d); D itself, (b, d), without `left`.
        left: (b, r), or None.
    """

    structure: ClassVar[str] = "lokr"
    factored: ClassVar[bool] = True

    C: Tensor
    right: Tensor
    left: Tensor | None = None

    @property
    def D(self) -> Tensor:
        """The second factor (b, d)."""
        return self.right if self.left is None else self.left @ self.right

    @cached_without_grad
    def _D(self) -> Tensor:
        return self.D

    @property
    def block(self) -> tuple[int, int]:
        """The shape (b, d) of D."""
        return (self.right if self.left is None else self.left).shape[0], self.right.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.C.shape[0] * self.block[0], self.C.shape[1] * self.block[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.C.dtype

    @property
    def device(self) -> torch.device:
        return self.C.device

    def dense(self) -> Tensor:
        C, D = rearrange(self.C, "a c -> a 1 c 1"), rearrange(self.D, "b d -> 1 b 1 d")
        return rearrange(C * D, "a b c d -> (a b) (c d)")

    def scaled(self, strength: float | Tensor) -> Kron:
        return Kron(self.C * strength, self.right, self.left)

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        # (C ⊗ B)(I ⊗ A) of rank c·r, or (I ⊗ B)(C ⊗ A) of rank a·r, whichever is smaller; D = B·A, or I·D, or D·I
        B, A = identity_factors(self.right) if self.left is None else (self.left, self.right)
        (a, c), C = self.C.shape, self.C.contiguous()
        if min(a, c) * A.shape[0] >= min(self.shape):
            return super().low_rank_factors()
        B, A = B.contiguous(), A.contiguous()
        identity = torch.eye(min(a, c), dtype=C.dtype, device=C.device)
        if c <= a:
            return torch.kron(C, B), torch.kron(identity, A)
        return torch.kron(identity, B), torch.kron(C, A)

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options: dict[str, Any] = {"outer": tuple(self.C.shape), "full": self.left is None}
        if self.left is None:
            return options, {"outer": self.C, "block": self.right}
        factors = {"outer": self.C, "left": self.left, "right": self.right}
        return options | {"rank": self.right.shape[0]}, factors

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        i = torch.arange(block.start, block.stop, block.step or 1, device=self.C.device)
        b = self.block[0]
        return (self.C[i // b][:, :, None] * self.D[i % b][:, None, :]).flatten(1)

    def rows_(self, block: slice, out: Tensor) -> None:
        for tiles, row, D in self._copies(block, out):
            torch.mul(row, D, out=tiles)

    def add_rows_(self, block: slice, W: Tensor) -> None:
        if W.dtype == self.dtype:
            for tiles, row, D in self._copies(block, W):
                tiles.addcmul_(row, D)
        else:
            super().add_rows_(block, W)

    def _copies(self, block: slice, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the parts of out that one row of C scales, as (rows, c, d), with that row (c, 1) and D (rows, 1, d)."""
        (b, d), start, D = self.block, block.start, self._D
        while start < block.stop:
            band = start // b
            stop = min(block.stop, (band + 1) * b)
            tiles = out[start - block.start : stop - block.start].unflatten(1, (-1, d))
            yield tiles, self.C[band, :, None], D[start - band * b : stop - band * b, None, :]
            start = stop

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        groups, d = g.groups, self.block[1]
        if self.C.shape[0] % groups:  # a group of the convolution ends inside a copy of D
            return super().apply(x, wx, g)
        C = self.C.reshape(groups, -1, self.C.shape[1])
        if self._mixes_first():
            mixed = g.mix(x, C, width=d // g.shape.positions)
            return g.contract(mixed, self.right)
        h = g.mix(g.contract(x, self.right), C, width=self.right.shape[0])
        return h if self.left is None else g.pointwise(h, self.left)

    def lookup(self, index: Tensor) -> Tensor:
        b = self.block[0]
        C, D = F.embedding(index // b, self.C), F.embedding(index % b, self.right if self.left is None else self.left)
        if self.left is not None:
            D = D @ self.right
        return (C[..., :, None] * D[..., None, :]).flatten(-2)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if g.groups > 1:
            return super().apply_onto(out, x, y, bias, g)
        C = self.C.unsqueeze(0)
        if self.left is not None:
            h = g.mix(g.contract(x, self.right), C, width=self.right.shape[0])
            return fused.add_pointwise_(out, h, self.left, g.spatial)
        if g.by_position and self._mixes_first():
            return fused.add_pointwise_(out, g.mix(x, C, width=self.block[1]), self.right, g.spatial)
        return super().apply_onto(out, x, y, bias, g)

    def _mixes_first(self) -> bool:
        """Whether C goes before a full D: the cheaper order. With a low-rank D, C acts at the bottleneck."""
        a, c = self.C.shape
        b, d = self.block
        return self.left is None and a * (c * d + b * d) <= c * b * (d + a)

    def inner(self, M: Tensor) -> Tensor:
        return (self._contracted(M) * self.D).sum()

    def _contracted(self, M: Tensor) -> Tensor:
        """Σ C_ac·M_(a,b),(c,d) over a and c, (b, d): C against Van Loan's rearrangement, which is never made."""
        (a, c), (b, d) = self.C.shape, self.block
        out = self.C.new_zeros(b, 1, d)
        for row, band in zip(self.C, M.reshape(a, b, c, d), strict=True):
            for part in row_blocks(b, c * d):
                tile = band[part].to(self.dtype)
                out[part].baddbmm_(row.expand(len(tile), 1, c), tile)
        return out[:, 0]

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del cache
        D = self.D
        return (self._contracted(W) * D).sum(), self.C.square().sum() * D.square().sum()

    def sqnorm(self) -> Tensor:
        return self.C.square().sum() * self.D.square().sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor:
        return self.sqnorm()

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        del max_abs_weight
        return self.C.abs().max() * self.D.abs().max()

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        D, (a, c), (b, d) = self.D, self.C.shape, self.block
        bands = (M[i * b : (i + 1) * b].reshape(b, c, d) for i in range(a))  # each shares one row of C
        dots = [
            torch.einsum("bcd,bd,c->b", band.to(self.dtype), D, row) for band, row in zip(bands, self.C, strict=True)
        ]
        return torch.cat(dots), torch.outer(self.C.square().sum(1), D.square().sum(1)).flatten()

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        left = None if self.left is None else self.right.t()
        right = self.right.t() if self.left is None else self.left.t()
        return Kron(self.C.t(), right, left).moments(M.t())

    def apply_flops(self, outputs: int) -> int:
        (a, c), (b, d) = self.C.shape, self.block
        if self.left is not None:
            r = self.left.shape[1]
            return 2 * outputs * r * (c * d + a * c + a * b)
        return 2 * outputs * min(c * b * (d + a), a * (c * d + b * d))

    def dense_flops(self) -> int:
        rank = 0 if self.left is None else self.left.shape[1]
        return self.shape[0] * self.shape[1] + 2 * rank * self.block[0] * self.block[1]

    def __repr__(self) -> str:
        (a, c), (b, d) = self.C.shape, self.block
        rank = "" if self.left is None else f", rank {self.left.shape[1]}"
        return f"C({a}×{c}) ⊗ D({b}×{d}{rank})"
