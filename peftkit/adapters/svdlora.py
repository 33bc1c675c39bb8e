"""SVDLoRA: LoRA whose ranks have gates, as AdaLoRA and SoRA train and prune them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, rank_scale, require, require_rank, uniform_fan_in_
from peftkit.adapters.peft_form import PeftForm
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("svdlora", "adalora", "sora")
class SVDLoRA(Adapter):
    r"""Adds a low-rank matrix with a gate a rank: ΔW = γ·P·diag(λ)·Q, with γ = α/r.

    Parameters are `up`, P (m, r), `gate`, λ (r,), and `down`, Q (r, n). A gate of 0 takes its rank out of ΔW. With
    init="adalora", P and Q are N(0, 0.02²) and λ starts at 0; with "sora", P starts at 0, λ at N(0, 1) and Q at
    U(±1/√n).

    Papers: AdaLoRA, https://arxiv.org/abs/2303.10512; SoRA: https://arxiv.org/abs/2311.11696.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 12 by default.
        alpha: α, by default the rank, so that γ = 1.
        init: "adalora" (default) or "sora".

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "svdlora", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r·(m + n + 1)
        100
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    facts: ClassVar[Facts] = Facts(
        "low rank", "γ·P·diag(λ)·Q", "ranks are to be pruned while training", peft="AdaLoraConfig"
    )
    convention: ClassVar[str] = "gamma*up@diag(gate)@down"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"gate"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up"})
    decays = frozenset({"up", "down"})
    gates: ClassVar[str | None] = "gate"

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 12,
        alpha: float | None = None,
        init: str = "adalora",
    ) -> None:
        super().__init__()
        require_rank("svdlora", rank)
        require(init in ("adalora", "sora"), "svdlora", "init", init, "'adalora' or 'sora'")
        self.scale = rank_scale("svdlora", rank, alpha)
        self.starts_at_zero = frozenset({"gate" if init == "adalora" else "up"})
        new = factory(weight)
        self.up = nn.Parameter(torch.zeros(shape.rows, rank, **new))
        self.gate = nn.Parameter(torch.zeros(rank, **new))
        self.down = nn.Parameter(torch.empty(rank, shape.columns, **new))
        if init == "adalora":
            nn.init.normal_(self.up, std=0.02)
            nn.init.normal_(self.down, std=0.02)
        else:
            nn.init.normal_(self.gate)
            uniform_fan_in_(self.down, shape.columns)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.up * (self.scale * self.gate), self.down)

    def form(self, weight: Tensor) -> PeftForm:
        rank, delta = len(self.gate), self.delta(weight)
        gate = self.gate * (self.scale * (rank + 1e-5) / rank)  # PEFT divides α by r + 1e-5
        options = {"init_r": rank, "target_r": rank, "lora_alpha": rank, "total_step": 1}
        own = {"lora_A": self.down, "lora_B": self.up, "lora_E": gate[:, None]}
        return PeftForm("svdlora", ("ADALORA", options), own, delta)
