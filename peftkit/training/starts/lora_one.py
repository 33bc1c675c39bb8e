"""LoRA-One: the factors of one step of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.errors import require_number, require_option
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class LoRAOne(Start):
    """Takes the leading r singular triples of −G: B₀ = −U_r·(S/S₁)^½/√stable and A₀ = (S/S₁)^½·V_rᵀ/√stable.

    γ·B₀·A₀ is the best step of rank r against the gradient (https://arxiv.org/abs/2502.01235). The paper begins after
    that step, which `first_step` does; without it ΔW is 0 and training begins in the same directions. It is for
    `anchored` with start="given".

    Args:
        stable: how much smaller than 1 the largest singular value of B₀·A₀ is, 128 by default.
        first_step: Begin at ΔW = γ·B₀·A₀, as the paper does.
    """

    stable: float = 128.0
    first_step: bool = False
    name: ClassVar[str] = "lora-one"
    needs: ClassVar[str] = "gradient"
    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def __post_init__(self) -> None:
        require_number("stable", self.stable)
        require_option(self.stable > 0, "stable", self.stable, "a number above 0")
        require_option(isinstance(self.first_step, bool), "first_step", self.first_step, "True or False")

    @property
    def moves(self) -> bool:
        return self.first_step

    def factors(self, seen: Seen) -> Factors:
        G, r = seen.of_gradient(), seen.rank
        root = (G.S[:r] / G.S[:1].clamp(min=1e-300) / self.stable).sqrt()
        return Factors(-G.U[:, :r] * root, root[:, None] * G.V[:r], G.energy(r))
