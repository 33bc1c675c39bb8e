"""LoRA, and LoCon: the same on convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Additive, PeftConfig
from peftkit.adapters.options import (
    factory,
    rank_scale,
    require_kernel,
    require_probability,
    require_rank,
    times,
    uniform_fan_in_,
)
from peftkit.adapters.pair import Pair
from peftkit.adapters.registry import register
from peftkit.delta import LowRank, LowRankStack
from peftkit.delta.as_low_rank import balanced
from peftkit.geometry import Shape
from peftkit.kernels.sharding import divided_as

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class LoRAForm(Additive):
    """B·A, as lora_up and lora_down under an alpha, or as PEFT's lora_B and lora_A, whose α is the rank."""

    delta: LowRank | LowRankStack

    @property
    def lora(self) -> LowRank | None:
        return self.delta if isinstance(self.delta, LowRank) else None

    def balanced(self) -> LoRAForm:
        return LoRAForm(balanced(self.delta)) if isinstance(self.delta, LowRank) else self

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        rank = self.delta.rank
        if isinstance(self.delta, LowRankStack):  # as PEFT has it: ranks of expert after expert, and of rank after rank
            up, down = self.delta.B, self.delta.A
            return {"lora_A.weight": down.flatten(0, 1), "lora_B.weight": up.permute(1, 2, 0).flatten(1)}
        alpha = float(max(1, rank)) if program.peft_names else alpha
        up = (self.delta.B * (rank / alpha)).reshape(*self.delta.B.shape, *(1,) * len(shape.kernel))
        down = self.delta.A.reshape(rank, shape.channels, *shape.kernel)
        if program.peft_names:
            return {"lora_A.weight": down, "lora_B.weight": up}
        return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(alpha))}

    def peft_rank(self, shape: Shape) -> int:
        del shape
        return self.delta.rank

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig:
        del written
        return "LORA", {"bias": "none"}


@register("lora", "locon")
class LoRA(Adapter):
    r"""Adds a low-rank matrix: ΔW = γ·B·A, with γ = α/r, or α/√r with `rslora`.

    Parameters are `up`, B (m, r), which starts at 0, and `down`, A (r, n), which starts at U(±1/√n). On a convolution
    (LoCon) A is a kernel with r outputs and B is 1×1. With `tucker`, A = T·V with `core`, T (r, r, K), and `down`,
    V (r, channels): the Tucker-2 form of LyCORIS.

    Papers: https://arxiv.org/abs/2106.09685; LoCon: https://arxiv.org/abs/2309.14859.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 8 by default.
        alpha: α, by default the rank, so that γ = 1.
        rslora: Scale by α/√r in place of α/r (https://arxiv.org/abs/2312.03732).
        tucker: Use the Tucker-2 form, on kernels larger than 1.
        dropout: The probability of dropping an element of the layer's input, on the adapter's branch only (as in PEFT).
        rank_dropout: The probability of dropping a rank; the ranks that stay are scaled by 1/(1−p).
        module_dropout: The probability of dropping the whole ΔW, unscaled (as in kohya).

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lora", rank=4, alpha=8)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n)
        96
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    facts: ClassVar[Facts] = Facts(
        "low rank",
        "γ·B·A",
        "every program has to read the file; a good default",
        peft="LoraConfig",
        lycoris="lora, locon",
    )
    convention: ClassVar[str] = "gamma*up@down"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    resizable: ClassVar[frozenset[str]] = frozenset(
        {"rank", "alpha", "rslora", "dropout", "rank_dropout", "module_dropout"}
    )
    starts_at_zero = frozenset({"up"})
    decays = frozenset({"up", "down", "core"})
    batched: ClassVar[bool] = True
    additive = LoRAForm

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        tucker: bool = False,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_rank("lora", rank)
        probabilities = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        for name, value in probabilities.items():
            require_probability("lora", name, value)
        self.scale = rank_scale("lora", rank, alpha, rslora)
        self.input_dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.stochastic = rank_dropout > 0 or module_dropout > 0
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        if tucker:
            require_kernel("lora", shape)
            self.down = nn.Parameter(uniform_fan_in_(torch.empty(rank, shape.channels, **new), shape.channels))
            core = torch.empty(rank, rank, shape.positions, **new)
            self.core: nn.Parameter | None = nn.Parameter(uniform_fan_in_(core, rank * shape.positions))
        else:
            self.down = nn.Parameter(uniform_fan_in_(torch.empty(rank, shape.columns, **new), shape.columns))
            self.core = None

    def takes_start(self) -> str:
        return "input" if self.pair() is not None else ""

    @torch.no_grad()
    def anchor_(self, up: Tensor, down: Tensor) -> None:
        for own, new in ((self.up, up), (self.down, down)):
            own.copy_(divided_as(own, new))

    def pair(self) -> Pair | None:
        return Pair(self.up, self.down, self.scale) if self.core is None and self.up.dim() == 2 else None

    def delta(self, weight: Tensor) -> LowRank | LowRankStack:
        del weight
        up = times(self.scale, self.up)
        experts = up.shape[:-2]  # of a stack of experts, each of which drops its own
        alone = (1,) * len(experts)
        if self.training and self.rank_dropout:
            keep = torch.rand((*experts, *alone, up.shape[-1]), device=up.device) >= self.rank_dropout
            up = up * keep / (1 - self.rank_dropout)
        if self.training and self.module_dropout:
            up = up * (torch.rand((*experts, *alone, *alone), device=up.device) >= self.module_dropout)
        if experts:
            return LowRankStack(up, self.down)
        return LowRank(up, self.down if self.core is None else tucker_down(self.core, self.down))


def tucker_down(core: Tensor, down: Tensor) -> Tensor:
    """Return A[i, (c, k)] = Σ_j T[i, j, k]·V[j, c], (r, channels·K), of core T (r, r, K) and down V (r, channels)."""
    return torch.einsum("ijk,jc->ick", core, down).flatten(1)
