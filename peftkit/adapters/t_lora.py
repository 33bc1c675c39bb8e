"""T-LoRA: a LoRA of fewer ranks at the noisy timesteps of a diffusion, from orthogonal factors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.frame import frame
from peftkit.adapters.options import factory, limited_rank, rank_scale, require, times
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape

#: which singular triples the factors start at, by the first of them: of k triples, r are taken
_FIRST = {"principal": lambda k, r: 0, "last": lambda k, r: k - r, "middle": lambda k, r: (k - r) // 2}


@register("t-lora", "tlora")
class TLoRA(Adapter):
    r"""Adds γ·(P·diag(λ)·Q − P₀·diag(λ₀)·Q₀) of its first b ranks, which a timestep chooses, with γ = α/r.

    P₀ (m, r), λ₀ (r,) and Q₀ (r, n) are singular triples of the base, or of a random matrix, so that ranks start
    independent of each other; P, λ and Q train from there. Parameters are how far they have come: `up`, P − P₀, `gate`,
    λ − λ₀, and `down`, Q − Q₀, which start at 0. `pk.training.use_timestep(model, t)` before a forward sets
    b = min_rank + ⌊((T − t)/T)^a·(r − min_rank)⌋, in training and in sampling; without it b is r. A file has all ranks.

    Paper: https://arxiv.org/abs/2507.05964.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the singular triples are taken.
        rank: r, at most min(m, n); 8 by default, or min(m, n) where that is less.
        alpha: α, by default the rank, so that γ = 1.
        min_rank: b at the noisiest timestep, 1 by default.
        start: Which triples: "principal", "last" or "middle".
        of: "base", or "random", of N(0, 1/r²); the file then holds P₀, λ₀ and Q₀.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "t-lora", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n + 1)
        100
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2507.05964"
    facts: ClassVar[Facts] = Facts(
        "low rank",
        "γ·(P·diag(λ)·Q − P₀·diag(λ₀)·Q₀)[:b]",
        "a diffusion model overfits to very few images",
        lycoris="tlora",
    )
    convention: ClassVar[str] = "gamma*((up0+up)@diag(gate0+gate)@(down0+down)-up0@diag(gate0)@down0)"
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("factors")
    decays = frozenset({"up", "gate", "down"})
    follows_timesteps: ClassVar[bool] = True
    up0: Tensor
    gate0: Tensor
    down0: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        min_rank: int = 1,
        start: str = "principal",
        of: str = "base",
    ) -> None:
        super().__init__()
        limit = min(shape.rows, shape.columns)
        rank = limited_rank("t-lora", rank, 8, limit, f"the singular values of this {shape} weight")
        require(0 < min_rank <= rank, "t-lora", "min_rank", min_rank, f"1 to the rank, {rank}")
        require(start in _FIRST, "t-lora", "start", start, f"one of {', '.join(_FIRST)}")
        require(of in ("base", "random"), "t-lora", "of", of, "'base' or 'random'")
        self.options = {"rank": rank}
        self.scale, self.start, self.of = rank_scale("t-lora", rank, alpha), start, of
        self.min_rank, self.used = min_rank, rank
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.gate = nn.Parameter(torch.zeros(rank, **new))
        self.down = nn.Parameter(torch.zeros(rank, shape.columns, **new))
        source = weight if of == "base" else torch.randn(shape.rows, shape.columns, **new) / rank
        for name, factor in zip(("up0", "gate0", "down0"), self._triples(source), strict=True):
            self.register_buffer(name, factor)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        b = self.used
        held = self.up0[:, :b] * self.gate0[:b]
        ahead = (self.up0 + self.up)[:, :b] * (self.gate0 + self.gate)[:b] - held
        up = times(self.scale, torch.cat((ahead, held), dim=1))
        return LowRank(up, torch.cat(((self.down0 + self.down)[:b], self.down[:b])))

    def use_prefix(self, share: float | None) -> None:
        rank = self.gate.shape[-1]
        self.used = rank if share is None else self.min_rank + int(share * (rank - self.min_rank))

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        if self.of == "base":
            for own, new in zip((self.up0, self.gate0, self.down0), self._triples(weight), strict=True):
                own.copy_(new)

    def derived(self) -> dict[str, Tensor]:
        return {} if self.of == "random" else {"up0": self.up0, "gate0": self.gate0, "down0": self.down0}

    def _triples(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank, count = len(self.gate), min(matrix.shape)
        first = _FIRST[self.start](count, rank)
        U, S, V = frame(matrix, first + rank)
        return U[:, first:].contiguous(), S[first:].clone(), V[first:].contiguous()
