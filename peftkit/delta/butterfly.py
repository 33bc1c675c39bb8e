"""Butterfly: ΔW = (R − I)·W with R a product of sparse rotations, the structure of BOFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache
from peftkit.geometry import Geometry


@dataclass(frozen=True, repr=False, eq=False)
class Butterfly(Delta):
    """ΔW = λ·(s∘R·W − W), R = R_t ⋯ R_1, R_i − I = P_iᵀ·diag(K_i1, …, K_ik)·P_i.

    P_i reads (c, 2, w) as (c, w, 2) with w = 2ⁱ⁻¹·b/2, so that stage i mixes rows w apart. What the stages add is
    summed, not subtracted from W: near the identity it has digits that R·W − W has lost.

    Attributes:
        K: (t, k, b, b), R_i − I block by block for each of t stages.
        W: The base weight (m, n), m = k·b.
        rescale: s (m,), None for 1.
        strength: λ, a number or a 0-d tensor.
    """

    K: Tensor
    W: Tensor
    rescale: Tensor | None = None
    strength: float | Tensor = 1.0

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return True

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.K.dtype

    @property
    def device(self) -> torch.device:
        return self.K.device

    def dense(self) -> Tensor:
        return self.tile(slice(0, self.shape[0]), slice(0, self.shape[1]))

    def scaled(self, strength: float | Tensor) -> Butterfly:
        return Butterfly(self.K, self.W, self.rescale, self.strength * strength)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        added = self._added(self.W[:, columns].to(self.dtype))
        return added if rows.stop - rows.start == self.shape[0] else added[rows]

    def sqnorm(self) -> Tensor:
        return super().inner_and_sqnorm(self.W, WeightCache())[1]

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        m, n = self.shape
        if 4 * m > n:
            return super().inner_and_sqnorm(W, cache)
        # W = L·Q with rows of Q orthonormal: (R − I)·L has the products and norms of (R − I)·W, on fewer columns
        L = cache("L", lambda: torch.linalg.qr(W.mT.to(self.dtype), mode="r").R.mT.contiguous())
        return super(Butterfly, Butterfly(self.K, L, self.rescale, self.strength)).inner_and_sqnorm(L, cache)

    def _added(self, W: Tensor) -> Tensor:
        """λ·(s∘R·W − W), W (m, z)."""
        m, z = W.shape
        D: Tensor | None = None
        for i, K in enumerate(self.K):
            # (c, 2, w, z) -> (c, w, 2, z) and back; by reshape, which leaves z open where a tracer follows it
            w = self._apart(i)
            pairs = (W if D is None else W + D).reshape(m // (2 * w), 2, w, z).transpose(1, 2)
            mixed = torch.bmm(K, pairs.reshape(*K.shape[:2], z)).reshape(m // (2 * w), w, 2, z)
            mixed = mixed.transpose(1, 2).reshape(m, z)
            D = mixed if D is None else D + mixed
        assert D is not None
        if self.rescale is not None:
            s = self.rescale[:, None]
            D = s * D + (s - 1) * W
        return D if isinstance(self.strength, float) and self.strength == 1.0 else D * self.strength

    def _apart(self, stage: int) -> int:
        return 2**stage * self.K.shape[-1] // 2

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        if g.shape.rows // g.groups % (2 * self._apart(len(self.K) - 1)):  # it mixes groups, which read other inputs
            return super().apply(x, wx, g)
        assert wx is not None
        channel = wx.dim() - 1 - g.spatial  # the stages mix output channels, wherever they are
        y = wx.movedim(channel, 0)
        return self._added(y.reshape(y.shape[0], -1).to(self.dtype)).reshape(y.shape).movedim(0, channel).to(wx.dtype)

    def apply_flops(self, outputs: int) -> int:
        return 2 * outputs * self.shape[0] * self.K.shape[0] * self.K.shape[-1]

    def dense_flops(self) -> int:
        return 2 * self.shape[0] * self.shape[1] * self.K.shape[0] * self.K.shape[-1]

    def __repr__(self) -> str:
        stages, k, b = self.K.shape[:3]
        return f"(R − I)·W with R a product of {stages} stages of {k} blocks {b}×{b}"
