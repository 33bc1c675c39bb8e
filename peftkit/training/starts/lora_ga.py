"""LoRA-GA: the first step of both factors goes along the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.errors import require_number, require_option
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class LoRAGA(Start):
    """Takes the leading 2r singular triples of G: B₀ = c·U_{r:2r} and A₀ = c·V_{:r}ᵀ with c = m^¼/√stable.

    The first step of gradient descent then goes along the best step that a matrix of rank 2r can take
    (https://arxiv.org/abs/2407.05000). It is for `anchored` with start="given".

    Args:
        stable: γ of the paper's "stable" scale, 16 by default; a larger one makes smaller factors.
    """

    stable: float = 16.0
    name: ClassVar[str] = "lora-ga"
    needs: ClassVar[str] = "gradient"
    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def __post_init__(self) -> None:
        require_number("stable", self.stable)
        require_option(self.stable > 0, "stable", self.stable, "a number above 0")

    def factors(self, seen: Seen) -> Factors:
        G, r = seen.of_gradient(), seen.rank
        count = min(2 * r, len(G.S))  # a small weight has fewer triples: those that are left, and some twice
        size = seen.weight.shape[0] ** 0.25 / self.stable**0.5
        return Factors(size * G.U[:, count - r : count], size * G.V[:r], G.energy(count))
