"""MiSS, formerly Bone: one small matrix that is shared by all runs of the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, limited_rank, require
from peftkit.adapters.peft_form import PeftForm
from peftkit.adapters.registry import register
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.base import WeightCache
from peftkit.geometry import Shape
from peftkit.kernels.blocks import upcast


@register("miss", "bone")
class MiSS(Adapter):
    r"""Adds one matrix D (r, m) to every run of r inputs: ΔW = Dᵀ·[I I … I].

    The parameter is `block`, D (r, m), which starts at 0: the input's runs of r numbers are summed, the last filled up
    with zeros, and D is applied to the sum. With `mini`, D has that many columns, repeated over the outputs. With
    bat=True (Bone's block affine mode), D is (m/r, r, r) and each r×r block W_ab of the base changes by
    W_ab·D_a + D_a.

    Paper: https://arxiv.org/abs/2409.15371.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype, and in ΔW with `bat`.
        rank: r, at most n; 64 by default, or n where that is less.
        mini: The columns of D, a divisor of the outputs; None for m.
        bat: Change blocks of the base by themselves; r divides outputs and fan-in.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "miss", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·m
        32
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.15371"
    facts: ClassVar[Facts] = Facts(
        "low rank", "Dᵀ·[I … I]", "a fast start is wanted with half of LoRA's numbers", peft="MissConfig"
    )
    convention: ClassVar[str] = "block.T@[I I ...], or W@block+block"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"block"})
    decays = frozenset({"block"})

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int | None = None, mini: int | None = None, bat: bool = False
    ) -> None:
        super().__init__()
        rank = limited_rank("miss", rank, 64, shape.columns, f"the fan-in of {shape}")
        self.options = {"rank": rank}
        fits = mini is None or (mini > 0 and shape.rows % mini == 0 and not bat)
        require(fits, "miss", "mini", mini, f"a divisor of the {shape.rows} outputs, without bat=True")
        divides = not bat or shape.rows % rank == shape.columns % rank == 0
        require(
            divides, "miss", "rank", rank, f"with bat=True, a divisor of {shape.rows} and {shape.columns} ({shape})"
        )
        self.rows, self.columns, self.reads_base = shape.rows, shape.columns, bat
        size = (shape.rows // rank, rank, rank) if bat else (rank, shape.rows if mini is None else mini)
        self.block = nn.Parameter(torch.zeros(size, **factory(weight)))

    @classmethod
    def needs_base(cls, options: Mapping[str, Any]) -> bool:
        return bool(options.get("bat"))

    @classmethod
    def least(cls, options: Mapping[str, Any]) -> tuple[int, int]:
        rank = options.get("rank") or 1
        return rank if options.get("bat") else options.get("mini") or 1, rank

    def delta(self, weight: Tensor) -> Delta:
        rank = self.block.shape[-1] if self.reads_base else self.block.shape[0]
        if self.reads_base:
            W = rearrange(weight.to(self.block.dtype), "(a i) (b j) -> a b i j", i=rank, j=rank)
            return Dense(rearrange(W @ self.block[:, None] + self.block[:, None], "a b i j -> (a i) (b j)"))
        up = self.block.mT.repeat(self.rows // self.block.shape[1], 1)
        return LowRank(up, F.one_hot(self._places(rank), rank).mT.to(self.block.dtype))

    def form(self, weight: Tensor) -> PeftForm:
        rank, mini = self.block.shape[-2:]
        start = "bat" if self.reads_base else "mini" if mini < self.rows else True
        options = {"r": rank, "mini_r": mini if start == "mini" else 1, "init_weights": start}
        delta = None if self.reads_base else self.delta(weight)
        return PeftForm("miss", ("MISS", options), {"miss_block": self.block}, delta)

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        if self.reads_base:
            return super().inner_and_sqnorm(weight, cache)
        # Σ D ⊙ (the sum of W's runs), and ‖D‖² times the runs that each of its rows is in
        block = upcast(self.block)
        rank, mini = block.shape
        sums = cache("sums", lambda: self._sums(weight, block))
        runs = torch.bincount(self._places(rank), minlength=rank)[:, None] * (self.rows // mini)
        return (block * sums).sum(), (block.square() * runs).sum()

    def _sums(self, W: Tensor, block: Tensor) -> Tensor:
        """What D (r, k) meets of W: the sum of its runs and of the rows that share a column of D, (r, k)."""
        runs = block.new_zeros(self.rows, len(block)).index_add(1, self._places(len(block)), W.to(block.dtype))
        return rearrange(runs, "(b k) r -> b r k", k=block.shape[1]).sum(0)

    def _places(self, rank: int) -> Tensor:
        """The row of D that is applied to each input, (n,)."""
        return torch.arange(self.columns, device=self.block.device) % rank
