"""TinyLoRA: a few numbers that layers train together, spread by random matrices between singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import drawn
from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.frame import frame
from peftkit.adapters.options import factory, limited_rank, require
from peftkit.adapters.peft_form import CommonForm, PeftForm
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("tiny-lora", "tinylora")
class TinyLoRA(Adapter):
    r"""Spreads a vector over the base's leading singular vectors: ΔW = U_r·√S_r·(Σ_i v_i·P_i)·√S_r·V_rᵀ, W = U·S·Vᵀ.

    The parameter is `vector`, v (u,), which starts at 0 and which all layers share, or `shared_by` of them at a time.
    Each P_i (r, r) is frozen, from U(±√(3/r)), of variance 1/r, and each layer has its own: the file holds the number
    that they are drawn with. U_r·√S_r (m, r) and √S_r·V_rᵀ (r, n) are computed from W and frozen. The paper has all of
    S on the left; half on each side, as in PEFT, is the same set of ΔW under another metric.

    Paper: https://arxiv.org/abs/2602.04118.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the singular vectors are taken.
        rank: r, at most min(m, n); 2 by default.
        size: u, how many numbers a vector has.
        shared_by: How many layers share a vector, one after another in the order of the model; by default all.
        group: Layers of another group, which another `Rule` is for, have a vector of their own.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        >>> report = pk.wrap(model, "tiny-lora", size=13, shared_by=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # u, and u again for the third layer
        26
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.04118"
    facts: ClassVar[Facts] = Facts(
        "factors of the base",
        "U·√S·(Σ v_i·P_i)·√S·Vᵀ",
        "a dozen numbers for the whole model must do, as under reinforcement learning",
        peft="TinyLoraConfig",
    )
    convention: ClassVar[str] = "U@sqrt(S)@sum(vector*P)@sqrt(S)@V, bank 1"
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("singular vectors")
    shares: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"vector": ("group",)})
    decays = frozenset({"vector"})
    left: Tensor
    right: Tensor
    number: Tensor
    projections: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int | None = None,
        size: int = 64,
        shared_by: int | None = None,
        group: str = "",
    ) -> None:
        super().__init__()
        limit = min(shape.rows, shape.columns)
        rank = limited_rank("tiny-lora", rank, 2, limit, f"the singular values of this {shape} weight")
        require(size > 0, "tiny-lora", "size", size, "a positive integer")
        require(shared_by is None or shared_by > 0, "tiny-lora", "shared_by", shared_by, "a positive integer")
        self.options, self.shared_by, new = {"rank": rank}, shared_by, factory(weight)
        self.vector = nn.Parameter(torch.zeros(size, **new))
        left, right = _frame(weight, rank)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("number", torch.randint(2**31, (), device=weight.device))
        self.register_buffer("projections", torch.empty(size, rank, rank, **new), persistent=False)
        if not weight.is_meta:
            TinyLoRA.refresh_(self)  # of this matrix alone, where it is one of a stack

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.left @ (self.vector[:, None, None] * self.projections).sum(0), self.right)

    def form(self, weight: Tensor) -> PeftForm:
        size, rank = self.projections.shape[:2]
        options = {"r": rank, "u": size, "weight_tying": 1.0, "save_projection": True}
        own = {"tinylora_A": self.right, "tinylora_B": self.left, "tinylora_P": self.projections}
        vector = {"tinylora_v.0": self.vector}
        return CommonForm("tiny-lora", ("TINYLORA", options), own, self.delta(weight), vector)

    @torch.no_grad()
    def refresh_(self) -> None:
        rank = len(self.right)
        self.projections.copy_(drawn(int(self.number), "tiny-lora", self.projections.shape) * (3 / rank) ** 0.5)

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        for own, new in zip((self.left, self.right), _frame(weight, len(self.right)), strict=True):
            own.copy_(new)

    def derived(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


def _frame(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r·√S_r (m, r) and √S_r·V_rᵀ (r, n)."""
    left, values, right = frame(weight, rank)
    return left * values.sqrt(), values.sqrt()[:, None] * right
