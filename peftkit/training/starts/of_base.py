"""PiSSA, MiLoRA and OLoRA: starts that are made of the base alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.adapters.anchored import factors_of_base
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class _OfBase(Start):
    """The factors that `anchored` has with a start of this name, which the file then holds."""

    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def factors(self, seen: Seen) -> Factors:
        up, down = factors_of_base(self.name, seen.weight, seen.rank, abs(seen.scale))
        B, A = up.double(), down.double()
        energy = ((B.mT @ B) * (A @ A.mT)).sum() * seen.scale**2
        share = float(energy / seen.weight.double().square().sum().clamp(min=1e-300))
        return Factors(up if seen.scale > 0 else -up, down, share)


class PiSSA(_OfBase):
    """Takes the leading r singular triples of W: B₀ = U_r·(S_r/γ)^½, A₀ = (S_r/γ)^½·V_rᵀ (arXiv:2404.02948)."""

    name: ClassVar[str] = "pissa"


class MiLoRA(_OfBase):
    """Takes the last r singular triples of W, those with the smallest values (arXiv:2406.09044)."""

    name: ClassVar[str] = "milora"


class OLoRA(_OfBase):
    """Takes the first r columns of Q and rows of R of W = Q·R, with a positive diagonal of R (arXiv:2406.01775)."""

    name: ClassVar[str] = "olora"
