"""Tied-LoRA: factors that layers of one shape train together, under scales of each layer's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, rank_scale, require_rank, times
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("tied-lora", "tied_lora")
class TiedLoRA(Adapter):
    r"""Scales factors that layers have in common: ΔW = γ·diag(v)·B·diag(u)·A, with γ = α/r.

    Parameters are `up`, B (m, r), which starts at 0 and which all layers of m outputs share, and `down`, A (r, n), from
    U(±1/√n), which all of n inputs share; and each layer's own `v` (m,) and `u` (r,), which start at 1. Without `u`,
    train_u=False, it is held at 1. The paper's variants with B and A frozen are VeRA.

    Paper: https://arxiv.org/abs/2311.09578.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 8 by default.
        alpha: α, by default the rank, so that γ = 1.
        train_u: Whether each layer trains u.
        seed: Of A at the start; layers with another seed have factors of their own.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> report = pk.wrap(model, "tied-lora", rank=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n) + 2·(m + r)
        52
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.09578"
    facts: ClassVar[Facts] = Facts(
        "frozen factors",
        "γ·diag(v)·B·diag(u)·A",
        "layers are many and equal, and B and A may be one pair for all of them",
    )
    convention: ClassVar[str] = "gamma*diag(v)@up@diag(u)@down"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"v"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up", "v"})
    shares: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"up": ("seed",), "down": ("seed",)})
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "down"})

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 8,
        alpha: float | None = None,
        train_u: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_rank("tied-lora", rank)
        self.scale, new = rank_scale("tied-lora", rank, alpha), factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        table = bank(seed, "tied-lora down", shape.columns, rank, self.up)
        self.down = nn.Parameter(table.mT.contiguous() / shape.columns**0.5)
        self.v = nn.Parameter(torch.ones(shape.rows, **new))
        if train_u:
            self.u = nn.Parameter(torch.ones(rank, **new))
        else:
            self.register_parameter("u", None)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        down = self.down if self.u is None else self.u[:, None] * self.down
        return LowRank(times(self.scale, self.v)[:, None] * self.up, down)
