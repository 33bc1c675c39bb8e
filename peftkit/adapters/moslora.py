"""MosLoRA: LoRA with a trained mixer between its factors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, rank_scale, require, require_rank, times, uniform_fan_in_
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("mos", "moslora")
class MosLoRA(Adapter):
    r"""Adds a low-rank matrix whose ranks are mixed: ΔW = γ·B·M·A, with γ = α/r.

    Parameters are `up`, B (m, r), which starts at 0, `mixer`, M (r, r), and `down`, A (r, n), which starts at U(±1/√n).
    M starts orthogonal, or at U(±1/√r) with init="uniform".

    Paper: https://arxiv.org/abs/2406.11909.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 8 by default.
        alpha: α, by default the rank, so that γ = 1.
        init: "orthogonal" (default) or "uniform".

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "mos", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n) + r²
        112
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11909"
    facts: ClassVar[Facts] = Facts(
        "low rank", "γ·B·M·A", "LoRA of the same rank learns too slowly, and one more r×r matrix may cost a little"
    )
    convention: ClassVar[str] = "gamma*up@mixer@down"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "mixer", "down"})

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int = 8, alpha: float | None = None, init: str = "orthogonal"
    ) -> None:
        super().__init__()
        require_rank("mos", rank)
        require(init in ("orthogonal", "uniform"), "mos", "init", init, "'orthogonal' or 'uniform'")
        self.scale = rank_scale("mos", rank, alpha)
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.mixer = nn.Parameter(torch.empty(rank, rank, **new))
        if init == "orthogonal":
            nn.init.orthogonal_(self.mixer)
        else:
            uniform_fan_in_(self.mixer, rank)
        self.down = nn.Parameter(uniform_fan_in_(torch.empty(rank, shape.columns, **new), shape.columns))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.up, times(self.scale, self.mixer) @ self.down)
