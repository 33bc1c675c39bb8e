"""Anchored LoRA: factors that start elsewhere than at zero, on a base that stays as it is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.frame import frame
from peftkit.adapters.options import factory, limited_rank, rank_scale, require, times, uniform_fan_in_
from peftkit.adapters.pair import Pair
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape
from peftkit.kernels.sharding import divided_as

STARTS = ("pissa", "milora", "olora", "given")


@register("anchored")
class AnchoredLoRA(Adapter):
    r"""Trains a LoRA from a start that is not zero: ΔW = γ·(B·A − B₀·A₀), with γ = α/r, or α/√r with `rslora`.

    Parameters are the offsets `up`, B − B₀ (m, r), and `down`, A − A₀ (r, n), which start at 0: ΔW is exactly 0 at the
    start, with the gradients of B and A, and the base is never written, which PEFT's own starts move. ΔW is of rank up
    to 2r. B₀ and A₀ are computed from W = U·S·Vᵀ and frozen:

    - "pissa": the leading r singular triples, B₀ = U_r·(S_r/γ)^½ and A₀ = (S_r/γ)^½·V_rᵀ
      (https://arxiv.org/abs/2404.02948);
    - "milora": the same of the last r, those with the smallest values (https://arxiv.org/abs/2406.09044);
    - "olora": the first r columns of Q and rows of R of W = Q·R, with a positive diagonal of R
      (https://arxiv.org/abs/2406.01775);
    - "given": B₀ = 0 and A₀ from U(±1/√n), as LoRA starts, until `pk.start` gives others; the file has them.

    Weight decay pulls to the start.

    Paper: https://arxiv.org/abs/2404.02948.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the start is taken.
        rank: r, at most min(m, n); 8 by default, or min(m, n) where that is less.
        alpha: α, by default the rank, so that γ = 1.
        rslora: Scale by α/√r in place of α/r.
        start: "pissa" (default), "milora", "olora" or "given".

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "anchored", rank=4, start="olora")
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n)
        96
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2404.02948"
    facts: ClassVar[Facts] = Facts(
        "low rank",
        "γ·(B·A − B₀·A₀)",
        "LoRA learns slowly: PiSSA's, MiLoRA's or OLoRA's start",
        peft='LoraConfig(init_lora_weights="pissa")',
    )
    convention: ClassVar[str] = "gamma*((up0+up)@(down0+down)-up0@down0)"
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("factors")
    decays = frozenset({"up", "down"})
    up0: Tensor
    down0: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        rslora: bool = False,
        start: str = "pissa",
    ) -> None:
        super().__init__()
        limit = min(shape.rows, shape.columns)
        rank = limited_rank("anchored", rank, 8, limit, f"the singular values of this {shape} weight")
        require(start in STARTS, "anchored", "start", start, f"one of {', '.join(STARTS)}")
        self.options = {"rank": rank}
        self.scale, self.start = rank_scale("anchored", rank, alpha, rslora), start
        require(
            self.scale > 0 or start == "given",
            "anchored",
            "alpha",
            alpha,
            "a number above 0, because the start is divided by γ",
        )
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.down = nn.Parameter(torch.zeros(rank, shape.columns, **new))
        up, down = factors_of_base(start, weight, rank, self.scale)
        self.register_buffer("up0", up)
        self.register_buffer("down0", down)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        up = torch.cat((self.up, self.up0), dim=1)
        return LowRank(times(self.scale, up), torch.cat((self.down0 + self.down, self.down)))

    def takes_start(self) -> str:
        return "factors" if self.start == "given" else ""

    def pair(self) -> Pair | None:
        return Pair(self.up, self.down, self.scale, self.up0, self.down0) if self.up.dim() == 2 else None

    @torch.no_grad()
    def anchor_(self, up: Tensor, down: Tensor) -> None:
        for own, new in ((self.up0, up), (self.down0, down)):
            own.copy_(divided_as(own, new))
        self.up.zero_()
        self.down.zero_()

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        if self.start == "given":
            return
        for own, new in zip(
            (self.up0, self.down0), factors_of_base(self.start, weight, len(self.down), self.scale), strict=True
        ):
            own.copy_(new)

    def derived(self) -> dict[str, Tensor]:
        return {} if self.start == "given" else {"up0": self.up0, "down0": self.down0}


@torch.no_grad()
def factors_of_base(start: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return B₀ (m, r) and A₀ (r, n) of one of the starts, for γ = scale."""
    if start == "given":
        new = factory(weight)
        down = uniform_fan_in_(torch.empty(rank, weight.shape[1], **new), weight.shape[1])
        return torch.zeros(weight.shape[0], rank, **new), down
    if start == "olora" and not weight.is_meta:
        Q, R = torch.linalg.qr(weight.to(factory(weight)["dtype"]))
        sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)[:rank]
        return (Q[:, :rank] * sign).contiguous(), sign[:, None] * R[:rank]
    last = start == "milora"
    U, S, V = frame(weight, None if last else rank)
    part = slice(-rank, None) if last else slice(rank)
    root = (S[part] / scale).sqrt()
    return U[:, part] * root, root[:, None] * V[part]
