"""MELoRA: small LoRAs on the diagonal blocks of the weight."""

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


@register("melora")
class MELoRA(Adapter):
    r"""Adds k low-rank matrices along the diagonal: ΔW = γ·blockdiag(B₁A₁, …, BₖAₖ), with γ = α/r.

    Parameters are `up`, B (k, m/k, r), which starts at 0, and `down`, A (k, r, n/k), which starts at U(±√(k/n)). The
    rank of ΔW is up to k·r for r(m + n) numbers, those of a LoRA of rank r. Blocks of inputs are of whole channels.

    Paper: https://arxiv.org/abs/2402.17263.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, of each block, 4 by default.
        blocks: k, a divisor of the outputs and of the channels; 2 by default.
        alpha: α, by default the rank, so that γ = 1.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "melora", rank=2, blocks=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n)
        48
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.17263"
    facts: ClassVar[Facts] = Facts(
        "low rank", "γ·blockdiag(B_i·A_i)", "a higher rank is wanted for the same numbers, and blocks need not mix"
    )
    convention: ClassVar[str] = "gamma*blockdiag(up@down)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "down"})

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int = 4, blocks: int = 2, alpha: float | None = None
    ) -> None:
        super().__init__()
        require_rank("melora", rank)
        divides = blocks > 0 and shape.rows % blocks == 0 and shape.channels % blocks == 0
        wanted = f"a divisor of the {shape.rows} outputs and the {shape.channels} channels of this {shape} weight"
        require(divides, "melora", "blocks", blocks, wanted)
        self.scale = rank_scale("melora", rank, alpha)
        new = factory(weight)
        columns = shape.columns // blocks
        self.up = nn.Parameter(torch.zeros(blocks, shape.rows // blocks, rank, **new))
        self.down = nn.Parameter(uniform_fan_in_(torch.empty(blocks, rank, columns, **new), columns))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(torch.block_diag(*times(self.scale, self.up)), torch.block_diag(*self.down))
