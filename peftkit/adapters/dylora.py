"""DyLoRA: a LoRA whose leading ranks alone are a LoRA too."""

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


@register("dylora")
class DyLoRA(Adapter):
    r"""Trains a LoRA so that its first b ranks do, for every b: ΔW = γ·B[:, :b]·A[:b], with γ = α/r for every b.

    Parameters are `up`, B (m, r), which starts at 0, and `down`, A (r, n), which starts at U(±1/√n). In training b is
    drawn from block, 2·block, …, r: by each layer for itself, or for all of them at each step by
    `pk.training.Prefixes(model)`, as in the paper. In eval mode b is `prefix`, by default r.

    Paper: https://arxiv.org/abs/2210.07558.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 16 by default.
        alpha: α, by default the rank, so that γ = 1.
        block: The step of b, a divisor of the rank; 1 by default.
        frozen: Train only the last block of the b ranks in use.
        prefix: b in eval mode, a multiple of `block`; None for r.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "dylora", rank=8)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n)
        192
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07558"
    facts: ClassVar[Facts] = Facts(
        "low rank", "γ·B[:, :b]·A[:b]", "the rank is to be chosen after training", lycoris="dylora"
    )
    convention: ClassVar[str] = "gamma*up[:,:b]@down[:b]"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "down"})
    stochastic = True
    draws_prefixes: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 16,
        alpha: float | None = None,
        block: int = 1,
        frozen: bool = False,
        prefix: int | None = None,
    ) -> None:
        super().__init__()
        require_rank("dylora", rank)
        require(block > 0 and rank % block == 0, "dylora", "block", block, f"a divisor of the rank, {rank}")
        whole = prefix is None or (0 < prefix <= rank and prefix % block == 0)
        require(whole, "dylora", "prefix", prefix, f"a multiple of the block, {block}, up to the rank, {rank}")
        self.scale, self.block, self.frozen = rank_scale("dylora", rank, alpha), block, frozen
        self.prefix = rank if prefix is None else prefix
        #: b of this step; None to draw it here
        self.drawn: int | None = None
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.down = nn.Parameter(uniform_fan_in_(torch.empty(rank, shape.columns, **new), shape.columns))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        if not self.training:
            return LowRank(times(self.scale, self.up[:, : self.prefix]), self.down[: self.prefix])
        if self.drawn is None:
            return self._drawn_here()
        up, down = self.up[:, : self.drawn], self.down[: self.drawn]
        if self.frozen:
            held = self.drawn - self.block
            up = torch.cat((up[:, :held].detach(), up[:, held:]), dim=1)
            down = torch.cat((down[:held].detach(), down[held:]))
        return LowRank(times(self.scale, up), down)

    def use_prefix(self, share: float | None) -> None:
        self.drawn = None if share is None else self.block * (1 + int(share * self._blocks))

    @property
    def _blocks(self) -> int:
        return len(self.down) // self.block

    def _drawn_here(self) -> LowRank:
        """ΔW with a b of this call: ranks are masked, so that no size depends on what was drawn."""
        b = self.block * (1 + (torch.rand((), device=self.up.device) * self._blocks).floor())
        rank = torch.arange(len(self.down), device=self.up.device)
        up, down = self.up * (rank < b), self.down
        if self.frozen:
            last = rank >= b - self.block
            up, down = torch.where(last, up, up.detach()), torch.where(last[:, None], down, down.detach())
        return LowRank(times(self.scale, up), down)
