"""RandLoRA: a sum of frozen random low-rank matrices under trained scales, of full rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.options import factory, rank_scale, require_rank
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape

#: of U(−1, 1), so that the bases have unit variance
_UNIT = 3**0.5


@register("randlora")
class RandLoRA(Adapter):
    r"""Adds a sum of scaled random bases: ΔW = γ·Σⱼ Bⱼ·diag(Λⱼ)·A·diag(Γⱼ), transposed if n > m, with γ = α/r.

    Parameters are `lambdas`, Λ (N, r), which starts at 0, and `gammas`, Γ (N, k), which starts at 1/max(m, n), with
    k = min(m, n) and N = ⌈k/r⌉. Bⱼ (max(m, n), r) and A (r, k) are frozen, of unit variance, and determined by `seed`
    alone: layers share them, and a file holds none. The released code, and PEFT's, pair other columns of B with other
    rows of Λ and Γ than this sum, the paper's.

    Paper: https://arxiv.org/abs/2502.00987.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r of each basis, 32 by default.
        alpha: α, by default 20·r, so that γ = 20.
        seed: Of the bases.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "randlora", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # N·(r + min(m, n))
        24
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    convention: ClassVar[str] = "gamma*sum(B@diag(lambda)@A@diag(gamma)), paper's pairing, bank 1"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"lambdas"})
    starts_at_zero = frozenset({"lambdas"})
    decays = frozenset({"lambdas", "gammas"})
    bases: Tensor
    basis: Tensor

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int = 32, alpha: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        require_rank("randlora", rank)
        self.scale = rank_scale("randlora", rank, 20 * rank if alpha is None else alpha)
        self.wide = shape.columns > shape.rows
        short, long = sorted((shape.rows, shape.columns))
        count = -(-short // rank)
        new = factory(weight)
        self.lambdas = nn.Parameter(torch.zeros(count, rank, **new))
        self.gammas = nn.Parameter(torch.full((count, short), 1 / long, **new))
        bases = bank(seed, "randlora bases", count * long, rank, self.lambdas) * _UNIT
        self.register_buffer("bases", rearrange(bases, "(j m) r -> m (j r)", j=count), persistent=False)
        basis = bank(seed, "randlora basis", short, rank, self.lambdas).mT * _UNIT
        self.register_buffer("basis", basis, persistent=False)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        scaled = self.lambdas[:, :, None] * self.basis * self.gammas[:, None]
        up, down = self.scale * self.bases, rearrange(scaled, "j r n -> (j r) n")
        return LowRank(down.mT, up.mT) if self.wide else LowRank(up, down)
