"""Block-LoRA: LoRA whose down-projection is one block, repeated over the input."""

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


@register("block-lora", "block_lora")
class BlockLoRA(Adapter):
    r"""Adds a low-rank matrix whose down-projection repeats: ΔW = γ·B·[A₁ A₁ … A₁], with γ = α/r.

    Parameters are `up`, B (m, r), which starts at 0, and `down`, A₁ (r, n/k), which starts at U(±1/√n) and is the same
    for all k runs of the input: A·x is A₁ times the sum of the runs.

    Paper: https://arxiv.org/abs/2501.16720, of which the abstract was at hand: this is a reading of it.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 8 by default.
        blocks: k, a divisor of the channels; 2 by default.
        alpha: α, by default the rank, so that γ = 1.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "block-lora", rank=4, blocks=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n/k)
        64
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.16720"
    facts: ClassVar[Facts] = Facts("low rank", "γ·B·[A₁ … A₁]", "the down-projection is to be small; experimental")
    convention: ClassVar[str] = "gamma*up@repeat(down)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "down"})

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int = 8, blocks: int = 2, alpha: float | None = None
    ) -> None:
        super().__init__()
        require_rank("block-lora", rank)
        divides = blocks > 0 and shape.channels % blocks == 0
        require(divides, "block-lora", "blocks", blocks, f"a divisor of the {shape.channels} channels of {shape}")
        self.scale, self.blocks = rank_scale("block-lora", rank, alpha), blocks
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.down = nn.Parameter(uniform_fan_in_(torch.empty(rank, shape.columns // blocks, **new), shape.columns))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(times(self.scale, self.up), self.down.repeat(1, self.blocks))
