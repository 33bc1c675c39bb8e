"""The keys of a base checkpoint -> its family, and where each weight is: in diffusers' layout or the original."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType

from peftkit.files.families import names
from peftkit.files.families.family import Family
from peftkit.files.families.module import NUMBER, Component, ModuleSpec

#: A checkpoint holds a U-Net or a text encoder if it has this share of its weights. Of the relatives that keep the
#: names, inpainting models and AnimateDiff have more; Stable Video Diffusion (0.68 of SD 2) and ControlNets less. Of
#: networks that are `complete` it has all.
SHARE = 0.75
_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


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
    kind: str  # "original", "comfy" or "diffusers": whose names; all but the last have the original's rows
    places: Mapping[str, Placement]  # canonical name -> its place

    def locate(self, name: str) -> Placement | None:
        """Return the place of a module, None if this checkpoint does not have it."""
        return self.places.get(name)


class _Keys:
    """The keys of a checkpoint, by what follows a prefix."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = shapes
        self._under: dict[str, Mapping[str, Sequence[str]]] = {}

    def under(self, prefix: str) -> Mapping[str, Sequence[str]]:
        """What follows the prefix, with the first number left out -> the numbers."""
        if prefix not in self._under:
            found: defaultdict[str, list[str]] = defaultdict(list)
            for key in self.shapes:
                number = _FIRST_NUMBER.search(key, len(prefix)) if key.startswith(prefix) else None
                if number is not None:
                    found[key[len(prefix) : number.start()] + NUMBER + key[number.end() :]].append(number[0])
            self._under[prefix] = found
        return self._under[prefix]

    def instances(self, prefix: str, name: str) -> Sequence[str]:
        """Return the numbers of the blocks that have a tensor of this name, ("",) where the name has no number."""
        if NUMBER in name:
            return self.under(prefix).get(name, ())
        return ("",) if prefix + name in self.shapes else ()


def of_checkpoint(shapes: Mapping[str, Sequence[int]], families: Iterable[Family] | None = None) -> Layout | None:
    """Return what a base checkpoint is, None if it is of no family here.

    shapes: all its keys and their shapes, over all its shards. It may hold one component only; a text encoder alone
    can be that of several families, of which the first that fits is taken. families: those to try, all by default.
    """
    best, most, keys = None, 0, _Keys(shapes)
    for family, kind in product(names.FAMILIES.values() if families is None else families, _KINDS):
        held = [_held(part, kind, keys) for part in family.parts]
        count = sum(fitting for fitting, _ in held)
        if count > most:
            places = {name: place for _, places in held for name, place in places.items()}
            best, most = Layout(family, kind, MappingProxyType(places)), count
    return best


_KINDS = ("diffusers", "original", "comfy")


def _held(part: Component, kind: str, keys: _Keys) -> tuple[int, Mapping[str, Placement]]:
    """How many weights of a component are there in the right shape, and all its places; (0, {}) if it is not there."""
    if kind == "comfy" and not part.respelled:
        return 0, {}
    own = (f"{part.name}.",) if kind == "diffusers" else (part.original, f"{part.comfy}.", *part.prefixes)
    for prefix, level in product((*own, *(() if part.general else ("",))), ("", "text_model.")):
        anchor = next(spec for spec in part.specs if spec.path == part.anchor)
        if not any(fits for _, _, fits in _places(part, kind, keys, prefix, level, anchor)):
            continue
        if part.unlike and f"{prefix}{part.unlike}.weight" in keys.shapes:
            continue
        found = {spec.name: list(_places(part, kind, keys, prefix, level, spec)) for spec in part.specs}
        there = {name for name, places in found.items() if any(fits for _, _, fits in places)}
        needed = {spec.name for spec in part.specs if not spec.optional}
        if len(needed & there) >= (1 if part.complete else SHARE) * len(needed):
            every = [each for places in found.values() for each in places]
            return sum(fits for _, _, fits in every), {name: place for name, place, _ in every}
    return 0, {}


def _places(
    part: Component, kind: str, keys: _Keys, prefix: str, level: str, spec: ModuleSpec
) -> Iterator[tuple[str, Placement, bool]]:
    """Yield a module of every block that is there: its name, its place, and whether the weight fits.

    prefix, level: what all keys begin with, and the level of theirs that they lack.
    """
    names = (f"{spec.path}.weight", f"{spec.path}.bias" if spec.bias else None)
    if kind != "diffusers":
        names = (spec.original, spec.original_bias)
    weight, bias = (name and _relative(name, part, kind, level) for name in names)
    assert weight is not None
    for number in keys.instances(prefix, weight):
        key, other = (name and prefix + name.replace(NUMBER, number) for name in (weight, bias))
        assert key is not None
        place = Placement(key, other if other in keys.shapes else None)
        shape = tuple(keys.shapes[key])
        if kind != "diffusers":
            start, stop = spec.rows_of(next(iter(shape), 0))
            place = replace(place, start=start, stop=stop, swapped=spec.swapped, transposed=spec.transposed)
        yield spec.name.replace(NUMBER, number), place, _fits(spec, place, shape)


def _relative(name: str, part: Component, kind: str, level: str) -> str:
    """A key without what it begins with, as a layout spells it."""
    relative = name.removeprefix(part.original) if kind != "diffusers" else name
    return (part.comfy_path(relative) if kind == "comfy" else relative).removeprefix(level)


def _fits(spec: ModuleSpec, place: Placement, shape: tuple[int, ...]) -> bool:
    if spec.shape and place.stop is not None:
        return len(shape) == len(spec.shape) and shape[0] >= place.stop and shape[1:] == spec.shape[1:]
    return spec.fits(shape[::-1] if place.transposed else shape)
