"""LoRA-FA: LoRA whose down-projection stays as it is drawn."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, rank_scale, require_rank, times, uniform_fan_in_
from peftkit.adapters.pair import Pair
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape
from peftkit.kernels.sharding import divided_as


@register("lora-fa", "lora_fa")
class LoRAFA(Adapter):
    r"""Adds a low-rank matrix of which one factor trains: ΔW = γ·B·A, with γ = α/r, or α/√r with `rslora`.

    The parameter is `up`, B (m, r), which starts at 0; `down`, A (r, n), is drawn from U(±1/√n) and frozen, so that a
    layer keeps r numbers of its input for the backward pass in place of n.

    Paper: https://arxiv.org/abs/2308.03303.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 8 by default.
        alpha: α, by default the rank, so that γ = 1.
        rslora: Scale by α/√r in place of α/r.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lora-fa", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·m
        32
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2308.03303"
    facts: ClassVar[Facts] = Facts("low rank", "γ·B·A, A frozen", "memory for activations is short")
    convention: ClassVar[str] = "gamma*up@down"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    decays = frozenset({"up"})
    down: Tensor

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int = 8, alpha: float | None = None, rslora: bool = False
    ) -> None:
        super().__init__()
        require_rank("lora-fa", rank)
        self.scale = rank_scale("lora-fa", rank, alpha, rslora)
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.register_buffer("down", uniform_fan_in_(torch.empty(rank, shape.columns, **new), shape.columns))

    def takes_start(self) -> str:
        return "input"

    @torch.no_grad()
    def anchor_(self, up: Tensor, down: Tensor) -> None:
        for own, new in ((self.up, up), (self.down, down)):
            own.copy_(divided_as(own, new))

    def pair(self) -> Pair | None:
        return Pair(self.up, self.down, self.scale) if self.up.dim() == 2 else None

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(times(self.scale, self.up), self.down)
