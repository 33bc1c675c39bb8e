"""GLoRA: a low-rank change of the base beside a low-rank addition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter, factory, rank_scale, require, require_rank, uniform_fan_in_
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("glora")
class GLoRA(Adapter):
    r"""ΔW = γ·(W·A1·A2 + B1·B2) with A1 (n, r), A2 (r, n), B1 (m, r), B2 (r, n), γ = α/r, in LyCORIS' form.

    One low-rank matrix [γ·W·A1, γ·B1]·[A2; B2] of rank 2r, once W is known. A2 and B2 start at 0. On Linear and 1×1
    convolutions: on a larger kernel A would mix channels, not columns.

    Paper: https://arxiv.org/abs/2306.07967, whose code has W ⊙ A in place of W·A, as PEFT has.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07967"
    convention: ClassVar[str] = "gamma*(W@base_up@base_down+up@down)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"base_up", "up"})
    reads_base: ClassVar[bool] = True
    on_another_base: ClassVar[str] = "multiplies the new base by the same matrix, and adds the same one"

    def __init__(self, shape: Shape, weight: Tensor, *, rank: int = 4, alpha: float | None = None) -> None:
        super().__init__()
        require_rank("glora", rank)
        require(shape.positions == 1, "glora", "rank", rank, f"a kernel of 1 (this weight is {shape}) for any rank")
        self.scale = rank_scale("glora", rank, alpha)
        new = factory(weight)
        self.base_up = nn.Parameter(uniform_fan_in_(torch.empty(shape.columns, rank, **new), rank))
        self.base_down = nn.Parameter(torch.zeros(rank, shape.columns, **new))
        self.up = nn.Parameter(uniform_fan_in_(torch.empty(shape.rows, rank, **new), rank))
        self.down = nn.Parameter(torch.zeros(rank, shape.columns, **new))

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str]:
        del options
        return frozenset({"up"})

    def delta(self, weight: Tensor) -> LowRank:
        projected = weight.to(self.base_up.dtype) @ self.base_up
        return LowRank(self.scale * torch.cat([projected, self.up], 1), torch.cat([self.base_down, self.down]))
