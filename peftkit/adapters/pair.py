"""Pair: the two factors of an adapter whose ΔW is their product, for training rules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """ΔW = γ·(B·A − B₀·A₀) with B = up + up0 and A = down + down0; without up0 and down0, which are then 0, γ·B·A.

    Attributes:
        up: (m, r), trained.
        down: (r, n), a parameter; a buffer of kinds that keep it as it is.
        scale: γ.
        up0: (m, r), frozen.
        down0: (r, n), frozen.
    """

    up: nn.Parameter
    down: Tensor
    scale: float
    up0: Tensor | None = None
    down0: Tensor | None = None

    @property
    def both_train(self) -> bool:
        """Whether A trains as B does: both do, or, while the adapter is frozen, neither."""
        return isinstance(self.down, nn.Parameter) and self.up.requires_grad == self.down.requires_grad

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return B and A as they are now."""
        B, A = self.up.detach(), self.down.detach()
        return B if self.up0 is None else B + self.up0, A if self.down0 is None else A + self.down0
