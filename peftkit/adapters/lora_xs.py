"""LoRA-XS: a small trained matrix between singular vectors of the base."""

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
from peftkit.delta.base import WeightCache
from peftkit.geometry import Shape
from peftkit.kernels.blocks import upcast
from peftkit.kernels.sharding import divided_as


@register("lora-xs", "lora_xs")
class LoRAXS(Adapter):
    r"""Adds a matrix between the base's leading singular vectors: ΔW = γ·U_r·R·S_r·V_rᵀ, with W = U·S·Vᵀ and γ = α/r.

    The parameter is `core`, R (r, r), which starts at 0: r² numbers, whatever the sizes of W. U_r (m, r) and S_r·V_rᵀ
    (r, n) are computed from W and frozen. The released code starts R at N(0, 10⁻⁵), which is not 0. With start="given"
    the two frames are any others, which `pk.start` gives, and the file holds them.

    Paper: https://arxiv.org/abs/2405.17604.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the singular vectors are taken.
        rank: r, at most min(m, n); 32 by default, or min(m, n) where that is less.
        alpha: α, by default the rank, so that γ = 1.
        start: "base" for frames of W's singular vectors, "given" for those of `pk.start`, until which they are W's.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lora-xs", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r²
        16
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17604"
    facts: ClassVar[Facts] = Facts("factors of the base", "γ·U·R·S·Vᵀ", "r² numbers a layer must do, whatever its size")
    convention: ClassVar[str] = "gamma*U@core@S@V"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"core"})
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("singular vectors")
    decays = frozenset({"core"})
    left: Tensor
    right: Tensor

    def __init__(
        self, shape: Shape, weight: Tensor, *, rank: int | None = None, alpha: float | None = None, start: str = "base"
    ) -> None:
        super().__init__()
        limit = min(shape.rows, shape.columns)
        rank = limited_rank("lora-xs", rank, 32, limit, f"the singular values of this {shape} weight")
        require(start in ("base", "given"), "lora-xs", "start", start, "base or given")
        self.options = {"rank": rank}
        self.scale, self.start = rank_scale("lora-xs", rank, alpha), start
        left, values, right = frame(weight, rank)
        self.register_buffer("left", left)
        self.register_buffer("right", values[:, None] * right)
        self.core = nn.Parameter(torch.zeros(rank, rank, **factory(weight)))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.left @ times(self.scale, self.core), self.right)

    def takes_start(self) -> str:
        return "frame" if self.start == "given" else ""

    @torch.no_grad()
    def anchor_(self, up: Tensor, down: Tensor) -> None:
        for own, new in ((self.left, up), (self.right, down)):
            own.copy_(divided_as(own, new))
        self.core.zero_()

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        # γ·Σ R ⊙ (Uᵀ·W·V·S), on its own base γ·Σ R_ii·S_i², and γ²·Σ R ⊙ (UᵀU·R·S·VᵀV·S): r² numbers
        left, right, core = map(upcast, (self.left, self.right, self.core))
        seen = cache("projections", lambda: left.mT @ LowRank(left, right).projected(weight))
        rows, columns = cache("left gram", lambda: left.mT @ left), cache("right gram", lambda: right @ right.mT)
        return self.scale * (core * seen).sum(), self.scale**2 * (core * (rows @ core @ columns)).sum()

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        if self.start == "given":
            return
        left, values, right = frame(weight, len(self.core))
        self.left.copy_(left)
        self.right.copy_(values[:, None] * right)

    def derived(self) -> dict[str, Tensor]:
        return {} if self.start == "given" else {"left": self.left, "right": self.right}
