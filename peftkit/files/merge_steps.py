"""What a merge does to the tensors of a base: adapters, changes of vectors, and trained values, each with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def conflicts(
    patches: Sequence[Planned], vectors: Sequence[PlannedVector], extras: Sequence[PlannedExtra]
) -> Iterator[str]:
    """Yield why steps on the same tensor cannot both be done.

    A trained value leaves room for nothing else, as which of them came first would matter, and two files may not read a
    weight in two ways.
    """
    flipped = {(part.weight, part.transposed): p.file for p in patches for part in p.parts}
    for weight in [weight for weight, transposed in flipped if transposed and (weight, False) in flipped]:
        files = flipped[weight, True], flipped[weight, False]
        yield f"{files[0]}: it reads {weight} as (in, out), and {files[1]} as (out, in)"
    changed = {part.weight: p.file for p in patches for part in p.parts}
    for vector in vectors:
        for key in (span.key for span in vector.spans if span.key in changed):
            yield f"{vector.file}: {vector.name} changes {key}, which {changed[key]} changes too: {_TOGETHER}"
    changed |= {span.key: v.file for v in vectors for span in v.spans}
    for extra in (e for e in extras if e.key in changed):
        yield f"{extra.file}: {extra.name} replaces {extra.key}, which {changed[extra.key]} changes too: {_TOGETHER}"


_TOGETHER = "load both into a model and merge there"
