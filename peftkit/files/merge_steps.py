"""What a merge does to the tensors of a base: adapters, changes of vectors, and trained values, each with its place."""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.files.families.layouts import Placement
from peftkit.files.place import Span
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Planned:
    """One patch and its place in the base. law: "additive" (the same ΔW on any base), "reapply" or "transplant".

    difference: ‖ΔW reapplied − ΔW transplanted‖/‖ΔW transplanted‖ where both bases are at hand; None elsewhere.
    """

    file: str
    name: str
    kind: str
    parts: tuple[Placement, ...]
    shape: Shape
    strength: float
    law: str
    difference: float | None = None

    @property
    def weight(self) -> str:
        """Where it goes, in one line."""
        return ", ".join(p.weight + ("" if p.start is None else f"[{p.start}:{p.stop}]") for p in self.parts)


@dataclass(frozen=True)
class PlannedVector:
    """A change of a bias or a norm, and where its entries go."""

    file: str
    name: str
    spans: tuple[Span, ...]
    strength: float


@dataclass(frozen=True)
class PlannedExtra:
    """A trained value E in place of a tensor W of the base, which becomes W + strength·(E − W)."""

    file: str
    name: str
    key: str
    strength: float
