"""GLoRA: a low-rank change of the base beside a low-rank addition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.form import Form, first_reason
from peftkit.adapters.options import factory, rank_scale, require, require_rank, uniform_fan_in_
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class BaseProductForm(Form):
    """ΔW = W·a1·a2 + b1·b2, under alpha = rank, because A1111, whose layout is the old one, ignores alpha."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor

    def structure(self, program: Target) -> str:
        return "glora old" if "glora old" in program.reads else "glora"

    def refusal(self, program: Target, shape: Shape) -> str:
        wide = self.a1.shape[1] in (shape.rows, shape.columns)
        return (
            first_reason((wide, "a GLoRA as wide as its weight can be read in two layouts"))
            or program.refusal("glora", shape)
            or first_reason((self.structure(program) not in program.reads, f"{program.title} has no GLoRA"))
        )

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del alpha
        factors = (self.a1, self.a2, self.b1, self.b2)
        names = ("a1", "a2", "b1", "b2") if self.structure(program) == "glora" else ("a2", "a1", "b2", "b1")
        ones = (1,) * len(shape.kernel)
        tensors = {f"{name}.weight": f.reshape(*f.shape, *ones) for name, f in zip(names, factors, strict=True)}
        return tensors | {"alpha": torch.tensor(float(self.a1.shape[1]))}


@register("glora")
class GLoRA(Adapter):
    r"""Adds a low-rank change of the base and a low-rank matrix: ΔW = γ·(W·A1·A2 + B1·B2), γ = α/r, in LyCORIS' form.

    Parameters are `base_up`, A1 (n, r); `base_down`, A2 (r, n); `up`, B1 (m, r); `down`, B2 (r, n). A2 and B2 start at
    0. Once W is known, ΔW is one low-rank matrix [γ·W·A1, γ·B1]·[A2; B2] of rank 2r. GLoRA adapts Linear and 1×1
    convolutions: on a larger kernel A would mix channels, not columns.

    Paper: https://arxiv.org/abs/2306.07967, whose code has W ⊙ A in place of W·A, as PEFT has.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 4 by default.
        alpha: α, by default the rank, so that γ = 1.

    Raises:
        OptionError: An option has a value that it cannot take, or the kernel is larger than 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "glora", rank=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(3n + m)
        112
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07967"
    convention: ClassVar[str] = "gamma*(W@base_up@base_down+up@down)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"base_up", "up"})
    starts_at_zero = frozenset({"base_down", "down"})
    decays = frozenset({"base_up", "base_down", "up", "down"})
    reads_base = True
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

    def form(self, weight: Tensor) -> BaseProductForm:
        del weight
        base_up, up = self.base_up.detach() * self.scale, self.up.detach() * self.scale
        return BaseProductForm(base_up, self.base_down.detach(), up, self.down.detach())
