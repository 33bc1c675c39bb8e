"""GLoRA: a low-rank change of the base beside a low-rank addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Form, first_reason
from peftkit.adapters.options import factory, rank_scale, require_rank, uniform_fan_in_
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
        wide = self.a1.shape[1] in (shape.rows, shape.channels)
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
        tensors = {f"{name}.weight": f.reshape(*f.shape, *ones) for name, f in zip(names[:3], factors[:3], strict=True)}
        b2 = self.b2.reshape(len(self.b2), shape.channels, *shape.kernel)
        tensors[f"{names[3]}.weight"] = b2
        return tensors | {"alpha": torch.tensor(float(self.a1.shape[1]))}


@register("glora")
class GLoRA(Adapter):
    r"""Adds a low-rank change of the base and a low-rank matrix: ΔW = γ·(W·A1·A2 + B1·B2), γ = α/r, in LyCORIS' form.

    Parameters are `base_up`, A1 (c, r); `base_down`, A2 (r, c); `up`, B1 (m, r); `down`, B2 (r, n), of c channels.
    A2 and B2 start at 0. A1·A2 mixes channels, at each of the K positions of a kernel alike: W·(A1·A2 ⊗ I_K). Once W is
    known, ΔW is one low-rank matrix [γ·W·(A1 ⊗ I_K), γ·B1]·[A2 ⊗ I_K; B2] of rank (K + 1)·r.

    Paper: https://arxiv.org/abs/2306.07967, whose code has W ⊙ A in place of W·A, as PEFT has.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 4 by default.
        alpha: α, by default the rank, so that γ = 1.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "glora", rank=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(2c + n + m)
        112
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07967"
    facts: ClassVar[Facts] = Facts(
        "low rank", "γ·(W·A₁·A₂ + B₁·B₂)", "the change should follow the base it is put on", lycoris="glora"
    )
    convention: ClassVar[str] = "gamma*(W@base_up@base_down+up@down)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"base_up", "up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    starts_at_zero = frozenset({"base_down", "down"})
    decays = frozenset({"base_up", "base_down", "up", "down"})
    reads_base = True
    on_another_base: ClassVar[str] = "multiplies the new base by the same matrix, and adds the same one"

    def __init__(self, shape: Shape, weight: Tensor, *, rank: int = 4, alpha: float | None = None) -> None:
        super().__init__()
        require_rank("glora", rank)
        self.scale = rank_scale("glora", rank, alpha)
        self.positions, new = shape.positions, factory(weight)
        self.base_up = nn.Parameter(uniform_fan_in_(torch.empty(shape.channels, rank, **new), rank))
        self.base_down = nn.Parameter(torch.zeros(rank, shape.channels, **new))
        self.up = nn.Parameter(uniform_fan_in_(torch.empty(shape.rows, rank, **new), rank))
        self.down = nn.Parameter(torch.zeros(rank, shape.columns, **new))

    def delta(self, weight: Tensor) -> LowRank:
        base_up, base_down = (self._at_every_position(factor) for factor in (self.base_up, self.base_down))
        projected = weight.to(base_up.dtype) @ base_up
        return LowRank(self.scale * torch.cat([projected, self.up], 1), torch.cat([base_down, self.down]))

    def _at_every_position(self, factor: Tensor) -> Tensor:
        """A factor of channels A as A ⊗ I_K, of columns: channels come before positions in a matrix."""
        if self.positions == 1:
            return factor
        identity = torch.eye(self.positions, dtype=factor.dtype, device=factor.device)
        return torch.einsum("ij,kl->ikjl", factor, identity).flatten(2).flatten(0, 1)

    def form(self, weight: Tensor) -> BaseProductForm:
        del weight
        base_up, up = self.base_up.detach() * self.scale, self.up.detach() * self.scale
        return BaseProductForm(base_up, self.base_down.detach(), up, self.down.detach())
