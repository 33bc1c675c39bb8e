"""Hadamard: ΔW = (B1·A1) ⊙ (B2·A2), the structure of FedPara and LoHa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import ELEMENT, Delta, WeightCache
from peftkit.delta.lowrank import LowRank
from peftkit.geometry import Geometry
from peftkit.kernels import fused, operators
from peftkit.kernels.blocks import BLOCK
from peftkit.kernels.cache import cached_without_grad
from peftkit.kernels.torch_private import eager, transformed

#: the highest rank at which a 4096² ΔW in bf16 is built faster as one product of rank r²: in 19 ms in place of 41 where
#: the processor has matrix units, and as fast where it has none
_NARROW = 8


@dataclass(frozen=True, repr=False, eq=False)
class Hadamard(Delta):
    """ΔW = (B1·A1) ⊙ (B2·A2), of rank at most r².

    Attributes:
        B1: (m, r).
        A1: (r, n).
        B2: (m, r).
        A2: (r, n).
    """

    structure: ClassVar[str] = "loha"
    factored: ClassVar[bool] = True

    B1: Tensor
    A1: Tensor
    B2: Tensor
    A2: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.B1.shape[0], self.A1.shape[1]

    @property
    def factors(self) -> tuple[Tensor, ...]:  # by name: the compiler of torch 2.4 does not read __dict__
        return self.B1, self.A1, self.B2, self.A2

    @property
    def rank(self) -> int:
        return self.A1.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.B1.dtype

    @property
    def device(self) -> torch.device:
        return self.B1.device

    def dense(self) -> Tensor:
        if not self._plain():
            return operators.differentiable_hadamard(None, self.factors, 1.0)
        if torch.is_grad_enabled() or not eager():
            return self.rows(slice(None))
        # One product of 16-bit numbers is less than a pass over two; fp16 is slow to multiply on a processor
        if self.dtype == torch.bfloat16 and self.rank <= _NARROW:
            return self.khatri_rao.dense()
        return self.dense_blockwise()

    def scaled(self, strength: float | Tensor) -> Hadamard:
        return Hadamard(self.B1 * strength, self.A1, self.B2, self.A2)

    @cached_without_grad
    def khatri_rao(self) -> LowRank:
        """The same ΔW as one product of rank r²: row i of B is B1_i ⊗ B2_i, column j of A is A1_j ⊗ A2_j."""
        return LowRank(fused.khatri_rao(self.B1, self.B2, 1), fused.khatri_rao(self.A1, self.A2, 0))

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        pairs = self.khatri_rao if self.rank**2 < min(self.shape) else None
        return super().low_rank_factors() if pairs is None else (pairs.B, pairs.A)

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"rank": self.rank}, {"up1": self.B1, "down1": self.A1, "up2": self.B2, "down2": self.A2}

    @property
    def row_multiple(self) -> int:
        return 1

    def rows(self, block: slice) -> Tensor:
        return (self.B1[block] @ self.A1) * (self.B2[block] @ self.A2)

    def rows_(self, block: slice, out: Tensor) -> None:
        torch.mm(self.B1[block], self.A1, out=out)
        out.mul_(self.B2[block] @ self.A2)

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        return self.khatri_rao.apply(x, wx, g)

    def lookup(self, index: Tensor) -> Tensor:
        return (F.embedding(index, self.B1) @ self.A1) * (F.embedding(index, self.B2) @ self.A2)

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        if not torch.is_grad_enabled() or g.groups > 1:
            return self.khatri_rao.apply_onto(out, x, y, bias, g)
        # For backward the pairs are made again: of a narrow layer they are as large as its weight
        if g.direct and not (g.transposed and g.spatial):
            h = fused.apply(_ContractPairs, x, self.A1, self.A2, g)
        else:
            h = g.contract(x, fused.khatri_rao(self.A1, self.A2, 0))
        return fused.add_pairs_(out, h, self.B1, self.B2, g.spatial)

    def rows_rescaled(self, f: Tensor) -> Hadamard:
        return Hadamard((self.B1 * f[:, None]).to(self.dtype), self.A1, self.B2, self.A2)

    def inner(self, M: Tensor) -> Tensor:
        return self.moments(M)[0].sum()

    def sqnorm(self) -> Tensor:
        # ‖ΔW‖² = Σ (FᵀF) ⊙ (HHᵀ) over the Khatri–Rao factors: r⁴ numbers, cheaper than mn·r for small ranks
        if self.rank**3 <= max(self.shape):
            return self.khatri_rao.sqnorm()
        return self.moments(self.A1.new_zeros(1, 1).expand(self.shape))[1].sum()

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        return LowRank(self.B1, self.A1).max_abs_bound(max_abs_weight) * LowRank(self.B2, self.A2).max_abs_bound(
            max_abs_weight
        )

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        if not self._on_gpu():
            return super().moments(M)
        inner, square = operators.hadamard_moments(M, self.factors)
        return inner, square

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        if not self._on_gpu():
            return super().inner_and_sqnorm(W, cache)
        inner, square = self.moments(W)
        return inner.sum(), square.sum()

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return Hadamard(self.A1.t(), self.B1.t(), self.A2.t(), self.B2.t()).moments(M.t())

    def added_to(self, M: Tensor, strength: float = 1.0) -> Tensor:
        if self._plain():
            return super().added_to(M, strength)
        return operators.differentiable_hadamard(M, self.factors, strength)

    def _plain(self) -> bool:
        """Whether an operator gains nothing, no kernel and no graph that would keep two matrices of note; or cannot."""
        m, n = self.shape
        small = not torch.is_grad_enabled() or m * n <= BLOCK
        return transformed() or (self.device.type == "cpu" and small)

    def _on_gpu(self) -> bool:
        """Whether the moments may have a kernel: they have no backward."""
        return self.device.type == "cuda" and not torch.is_grad_enabled()

    def apply_flops(self, outputs: int) -> int:
        # The Khatri–Rao factors are made first; where no gradients are asked for they are kept, and only read
        touched = ELEMENT if torch.is_grad_enabled() else ELEMENT // 4
        return (2 * outputs + touched) * self.rank**2 * sum(self.shape)

    def dense_flops(self) -> int:
        return (4 * self.rank + 1) * self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        return f"{LowRank(self.B1, self.A1)!r} ⊙ {LowRank(self.B2, self.A2)!r}"


class _ContractPairs(torch.autograd.Function):
    """g.contract(x, khatri_rao(A1, A2, 0)), whose pairs backward makes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A1: Tensor, A2: Tensor, g: Geometry) -> Tensor:
        ctx.save_for_backward(x, A1, A2)
        ctx.geometry = g
        return g.contract(x, fused.khatri_rao(A1, A2, 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gh,), (x, A1, A2), (for_x, *for_pair, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        pairs = fused.like(fused.khatri_rao(A1, A2, 0), gh)
        gx, gA = ctx.geometry.contraction_gradients(gh, x, pairs, for_x)
        return gx, *fused.pair_gradients(gA, A1, A2, 0, for_pair), None
