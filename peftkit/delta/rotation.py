"""Rotation: ΔW = (R − I)·W or W·(R − I)ᵀ with R block-diagonal, the structure of OFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache, total
from peftkit.geometry import Geometry
from peftkit.kernels import outputs
from peftkit.kernels.blocks import row_blocks
from peftkit.kernels.torch_private import eager


@dataclass(frozen=True, repr=False, eq=False)
class Rotation(Delta):
    """ΔW = K·W (side "out") or W·Kᵀ (side "in") with K = R − I = diag(K_1, …, K_k).

    K is held, not R: near the identity R − I has digits that R has lost.

    Attributes:
        K: The blocks (k, b, b).
        W: The base weight (m, n), of which k·b rows (side "out") or columns (side "in") are rotated.
        side: "out" or "in".
    """

    K: Tensor
    W: Tensor
    side: str = "out"

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return self.side == "out"

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.K.dtype

    @property
    def device(self) -> torch.device:
        return self.K.device

    @property
    def size(self) -> int:
        """b, the size of a block."""
        return self.K.shape[-1]

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.shape[0])) if torch.is_grad_enabled() or not eager() else self.dense_blockwise()

    def scaled(self, strength: float | Tensor) -> Rotation:
        return Rotation(self.K * strength, self.W, self.side)

    @property
    def row_multiple(self) -> int:
        return self.size if self.side == "out" else 1

    def rows(self, block: slice) -> Tensor:
        if self.side == "out":
            return self.tile(block, slice(0, self.shape[1]))
        W = rearrange(self.W[block].to(self.dtype), "m (k b) -> m k b", b=self.size)
        return rearrange(torch.einsum("mkj,kij->mki", W, self.K), "m k b -> m (k b)")

    def rows_(self, block: slice, out: Tensor) -> None:
        if self.side == "in":
            return super().rows_(block, out)
        W = self.W[block].to(out.dtype)
        K = self.K[block.start // self.size : block.stop // self.size]
        torch.bmm(K, W.unflatten(0, (-1, self.size)), out=out.unflatten(0, (-1, self.size)))
        return None

    def tile(self, rows: slice, columns: slice) -> Tensor:
        if self.side == "in":
            return super().tile(rows, columns)
        W = rearrange(self.W[rows, columns].to(self.dtype), "(k b) n -> k b n", b=self.size)
        return rearrange(self.K[rows.start // self.size : rows.stop // self.size] @ W, "k b n -> (k b) n")

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        if self.side == "out":
            if self._spans_groups(g):
                return super().apply(x, wx, g)
            assert wx is not None
            return g.mix(wx, self.K)
        if g.shape.positions > 1:  # the blocks span kernel positions, which the input does not have
            return super().apply(x, wx, g)
        return g.run(g.mix(x, self.K.transpose(-1, -2).repeat(g.groups, 1, 1)), self.W)

    def lookup(self, index: Tensor) -> Tensor:
        if self.side == "out":  # a row of ΔW is made of all rows of its block
            return super().lookup(index)
        W = F.embedding(index, self.W).to(self.dtype).unflatten(-1, (-1, self.size))
        return torch.einsum("...kj,kij->...ki", W, self.K).flatten(-2)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if self.side == "in" or out is not y or self._spans_groups(g):
            return super().apply_onto(out, x, y, bias, g)
        return outputs.rotated(y, self.K, bias, g.spatial)

    def _spans_groups(self, g: Geometry) -> bool:
        """Whether a block mixes rows of several groups, which read different inputs."""
        return g.shape.rows // g.groups % self.size != 0

    def inner(self, M: Tensor) -> Tensor:
        return self.moments(M)[0].sum()

    def sqnorm(self) -> Tensor:
        blocks = (self.rows(block).reshape(-1) for block in row_blocks(*self.shape, self.row_multiple))
        return total([torch.dot(block, block) for block in blocks])

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        return self.K.abs().sum(-1).max() * max_abs_weight

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        if 4 * self.size > self.shape[1 if self.side == "out" else 0]:  # the Gram matrices would be no smaller than W
            return super().inner_and_sqnorm(W, cache)
        G = cache(f"{self.side} {self.size}", lambda: self._grams(W))
        # <K·W, W> = <K, W·Wᵀ> and ‖K·W‖² = <K·W·Wᵀ, K>, block by block
        return (self.K * G).sum(), ((self.K @ G) * self.K).sum()

    def _grams(self, W: Tensor) -> Tensor:
        """W_b·W_bᵀ of the b rows (or W_bᵀ·W_b of the columns) that a block of R reads, (k, b, b)."""
        if self.side == "in":
            G = torch.zeros_like(self.K)
            for rows in row_blocks(*W.shape):
                columns = W[rows].to(self.dtype).unflatten(1, (-1, self.size))
                G += torch.einsum("mki,mkj->kij", columns, columns)
            return G
        blocks = (
            W[rows].to(self.dtype).unflatten(0, (-1, self.size))
            for rows in row_blocks(W.shape[0], W.shape[1], self.size)
        )
        return torch.cat([block @ block.mT for block in blocks])

    def apply_flops(self, outputs: int) -> int:
        m, n = self.shape
        if self.side == "out":
            return 2 * outputs * m * self.size
        return 2 * outputs * n * (self.size + m)

    def dense_flops(self) -> int:
        return 2 * self.shape[0] * self.shape[1] * self.size

    def __repr__(self) -> str:
        k, b = self.K.shape[:2]
        product = "(R − I)·W" if self.side == "out" else "W·(R − I)ᵀ"
        return f"{product} with R = diag of {k} blocks {b}×{b}"
