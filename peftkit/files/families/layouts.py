"""The keys of a base checkpoint -> its family, and where each weight is: in diffusers' layout or the original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType

from peftkit.files.families import names
from peftkit.files.families.denoisers import Component
from peftkit.files.families.names import Family, ModuleSpec

#: A checkpoint holds a component if it has this share of its weights. Of the relatives that keep the names, inpainting
#: models, AnimateDiff and Chroma (0.87 of Flux) have more; Stable Video Diffusion (0.68 of SD 2) and ControlNets less.
SHARE = 0.75


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint or a model has the rows of a patch: a weight, or its rows [start, stop).

    Attributes:
        weight: the weight's key.
        bias: the key of the bias beside it, None without one.
        start: the first row, None for a whole weight.
        stop: the row after the last, None for a whole weight.
        swapped: whether the two halves of the rows change places.
        transposed: whether the weight is kept as (in, out).
    """

    weight: str
    bias: str | None = None
    start: int | None = None
    stop: int | None = None
    swapped: bool = False
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """What a base checkpoint is, and where it has each module."""

    family: Family
    kind: str  # "original" or "diffusers": whose names and whose rows
    places: Mapping[str, Placement]  # canonical name -> its place

    def locate(self, name: str) -> Placement | None:
        """Return the place of a module, None if this checkpoint does not have it."""
        return self.places.get(name)


def of_checkpoint(shapes: Mapping[str, Sequence[int]], families: Iterable[Family] | None = None) -> Layout | None:
    """Return what a base checkpoint is, None if it is of no family here.

    shapes: all its keys and their shapes, over all its shards. It may hold one component only; a text encoder alone
    can be that of several families, of which the first that fits is taken. families: those to try, all by default.
    """
    best, most = None, 0
    for family, kind in product(names.FAMILIES.values() if families is None else families, ("diffusers", "original")):
        held = [_held(part, kind, shapes) for part in family.parts]
        count = sum(fitting for fitting, _ in held)
        if count > most:
            places = {name: place for _, places in held for name, place in places.items()}
            best, most = Layout(family, kind, MappingProxyType(places)), count
    return best


def _held(part: Component, kind: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, Mapping[str, Placement]]:
    """How many weights of a component are there in the right shape, and all its places; (0, {}) if it is not there."""
    prefixes = (f"{part.name}.", "") if kind == "diffusers" else (part.original, f"{part.comfy}.", "")
    for prefix, level in product(prefixes, ("", "text_model.")):
        expected = partial(_expected, part, kind, prefix, level)
        if not _fits(part.modules[part.anchor], expected(part.modules[part.anchor]), shapes):
            continue
        places = {module.name: expected(module) for module in part.modules.values()}
        fitting = sum(_fits(module, places[module.name], shapes) for module in part.modules.values())
        if fitting >= SHARE * len(places):
            there = {name: place for name, place in places.items() if place.weight in shapes}
            return fitting, {n: p if p.bias in shapes else replace(p, bias=None) for n, p in there.items()}
    return 0, {}


def _expected(part: Component, kind: str, prefix: str, level: str, module: ModuleSpec) -> Placement:
    """Where a module is if all keys have this prefix, and lack this level."""

    def key(relative: str) -> str:
        return prefix + relative.removeprefix(level)

    if kind == "diffusers":
        return Placement(key(f"{module.path}.weight"), key(f"{module.path}.bias") if module.bias else None)
    weight, bias = (k and key(k.removeprefix(part.original)) for k in (module.original, module.original_bias))
    return Placement(weight or "", bias, module.start, module.stop, module.swapped, module.transposed)


def _fits(module: ModuleSpec, place: Placement, shapes: Mapping[str, Sequence[int]]) -> bool:
    shape = tuple(shapes.get(place.weight, ()))
    if place.stop is not None:
        return len(shape) == len(module.shape) and shape[0] >= place.stop and shape[1:] == module.shape[1:]
    return shape == (module.shape[::-1] if place.transposed else module.shape)
