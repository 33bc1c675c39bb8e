"""MoRA: one square matrix of high rank, tiled over the weight."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, require, require_rank
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("mora")
class MoRA(Adapter):
    r"""Adds a square matrix M between a fixed compression and a fixed expansion: ΔW = D·M·C.

    The parameter is `core`, M (k, k), which starts at 0. k is ⌊√((m + n)·r) + ½⌋, so that M has about the numbers of a
    LoRA of rank r, and at most min(m, n). The input is cut into runs of k, the last filled up with the first inputs.
    With mode="sharing", C sums the runs and D tiles the k outputs: ΔW[i, j] = M[i mod k, j mod k], of rank up to k.
    With "rope", run t is turned by the angles t·10000^(−2i/k) of rotary embeddings, M is applied to every run, and the
    outputs of all runs follow one another: ΔW is block-diagonal, with blocks M·Rot(t).

    Paper: https://arxiv.org/abs/2405.12130.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r of the LoRA with as many numbers, 8 by default.
        mode: "sharing" (default, type 1 of the released code) or "rope" (type 6).

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "mora", rank=1)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # about r·(m + n)
        25
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.12130"
    facts: ClassVar[Facts] = Facts(
        "whole matrices", "M[i mod k, j mod k]", "new facts are to be learned, at a high rank"
    )
    convention: ClassVar[str] = "expand@core@compress, wrapped"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"core"})
    decays = frozenset({"core"})

    def __init__(self, shape: Shape, weight: Tensor, *, rank: int = 8, mode: str = "sharing") -> None:
        super().__init__()
        require_rank("mora", rank)
        require(mode in ("sharing", "rope"), "mora", "mode", mode, "'sharing' or 'rope'")
        self.rows, self.columns, self.mode = shape.rows, shape.columns, mode
        size = min(int(math.sqrt((shape.rows + shape.columns) * rank) + 0.5), shape.rows, shape.columns)
        if mode == "rope":
            size -= size % 2
            require(size > 0, "mora", "mode", mode, f"'sharing': rotations need two outputs and inputs, {shape} has 1")
        self.core = nn.Parameter(torch.zeros(size, size, **factory(weight)))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        size = len(self.core)
        runs = -(-self.columns // size)
        # which inputs each place of a run holds: the last run goes on with the first inputs
        place = torch.arange(runs * size, device=self.core.device)
        held = torch.zeros(runs * size, self.columns, dtype=self.core.dtype, device=self.core.device)
        held[place, place % self.columns] = 1
        if self.mode == "sharing":
            output = torch.arange(self.rows, device=self.core.device) % size
            return LowRank(self.core[output], rearrange(held, "(t k) n -> t k n", t=runs).sum(0))
        turned = _turned(rearrange(held, "(t k) n -> t k n", t=runs))
        output = torch.arange(self.rows, device=self.core.device) % (runs * size)
        ahead = torch.block_diag(*[self.core] * runs)
        return LowRank(ahead[output], rearrange(turned, "t k n -> (t k) n"))


def _turned(runs: Tensor) -> Tensor:
    """Rot(t) of every run t, of rotary embeddings whose pairs are (i, i + k/2). runs: (t, k, n)."""
    half = runs.shape[1] // 2
    exponent = torch.arange(half, device=runs.device, dtype=torch.float64) / half
    angle = torch.arange(len(runs), device=runs.device, dtype=torch.float64)[:, None] * 10000.0**-exponent
    cos, sin = (f(angle).to(runs.dtype)[..., None] for f in (torch.cos, torch.sin))
    first, second = runs[:, :half], runs[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)
