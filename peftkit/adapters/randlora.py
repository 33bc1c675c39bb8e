"""RandLoRA: a sum of frozen random low-rank matrices under trained scales, of full rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, rank_scale, require, require_rank
from peftkit.adapters.peft_form import PeftForm, RandLoRAForm
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
    alone: layers share them, and a file holds none, unless `save_projection` keeps the layer's part of both there.

    The released code and PEFT compute another sum, with pairing="peft": they flatten the N·r columns of [B₁ … B_N] by
    basis and the rows of [Λ₁·A·Γ₁ … Λ_N·A·Γ_N] by rank, so that column t of the one meets row t of the other with Bⱼ's
    i-th column at t = j·r + i and Λⱼ's i-th row at t = i·N + j. Γ then starts at 1/max(N, k), as theirs.

    Paper: https://arxiv.org/abs/2502.00987.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r of each basis, 32 by default.
        alpha: α, by default 20·r, so that γ = 20.
        seed: Of the bases.
        pairing: "paper", the sum above, or "peft".
        save_projection: Keep B and A in the file.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "randlora", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # N·(r + min(m, n))
        24
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00987"
    facts: ClassVar[Facts] = Facts(
        "frozen factors",
        "γ·Σ B_j·diag(Λ_j)·A·diag(Γ_j)",
        "full rank is wanted for few numbers, and time is not short",
        peft='RandLoraConfig, with pairing="peft"',
    )
    convention: ClassVar[str] = "gamma*sum(B@diag(lambda)@A@diag(gamma)), paper's pairing, bank 1"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"lambdas"})
    starts_at_zero = frozenset({"lambdas"})
    decays = frozenset({"lambdas", "gammas"})
    bases: Tensor
    basis: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 32,
        alpha: float | None = None,
        seed: int = 0,
        pairing: str = "paper",
        save_projection: bool = False,
    ) -> None:
        super().__init__()
        require_rank("randlora", rank)
        require(pairing in ("paper", "peft"), "randlora", "pairing", pairing, "'paper' or 'peft'")
        self.scale = rank_scale("randlora", rank, 20 * rank if alpha is None else alpha)
        self.seed, self.pairing, self.wide = seed, pairing, shape.columns > shape.rows
        short, long = sorted((shape.rows, shape.columns))
        count = -(-short // rank)
        new = factory(weight)
        self.lambdas = nn.Parameter(torch.zeros(count, rank, **new))
        start = 1 / (long if pairing == "paper" else max(count, short))
        self.gammas = nn.Parameter(torch.full((count, short), start, **new))
        if pairing == "paper":
            tables = bank(seed, "randlora bases", count * long, rank, self.lambdas)
            bases = rearrange(tables, "(j m) r -> m (j r)", j=count)
        else:  # each a table of its own, so that a larger layer has the same and more
            bases = torch.cat([bank(seed, f"randlora basis {j}", long, rank, self.lambdas) for j in range(count)], 1)
        self.register_buffer("bases", bases * _UNIT, persistent=save_projection)
        basis = bank(seed, "randlora basis", short, rank, self.lambdas).mT * _UNIT
        self.register_buffer("basis", basis, persistent=save_projection)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        scaled = self.lambdas[:, :, None] * self.basis * self.gammas[:, None]
        rows = "j r n -> (j r) n" if self.pairing == "paper" else "j r n -> (r j) n"
        up, down = self.scale * self.bases, rearrange(scaled, rows)
        return LowRank(down.mT, up.mT) if self.wide else LowRank(up, down)

    @classmethod
    def structure(cls, options: Mapping[str, Any]) -> str:
        return "randlora" if options.get("pairing") == "peft" else "randlora of the paper"

    def form(self, weight: Tensor) -> PeftForm:
        count, rank = self.lambdas.shape
        tables = {"randlora_A": self.basis[:, None], "randlora_B": self.bases.unflatten(1, (count, rank))}
        options = {"r": rank, "randlora_alpha": self.scale * rank, "projection_prng_key": self.seed}
        own = {"randlora_lambda": self.lambdas.mT, "randlora_gamma": self.gammas}
        config = "RANDLORA", {**options, "save_projection": True}
        return RandLoRAForm(self.structure(self.options), config, own, self.delta(weight), tables)
