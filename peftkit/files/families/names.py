"""The model families there are, and which of them the names in an adapter file may be of.

FAMILIES          the families, one file of `models` each or a few
guess             the names in an adapter file -> the families it may be of
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from peftkit.files.families import models
from peftkit.files.families.family import STYLES as STYLES
from peftkit.files.families.family import Family as Family
from peftkit.files.families.module import ModuleSpec as ModuleSpec


def _published() -> Iterator[Family]:
    """The families of every module of `models`."""
    for module in pkgutil.iter_modules(models.__path__):
        yield from importlib.import_module(f"{models.__name__}.{module.name}").FAMILIES


#: Where an adapter or a checkpoint can be of several families, the first is taken
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in sorted(_published(), key=lambda family: (family.published, family.name))}
)


def guess(foreign: Mapping[str, tuple[int, int] | None]) -> tuple[Family, ...]:
    """Return the families that have all these modules in these shapes, first the ones that spell names so.

    Of families that spell names alike, one whose every block the file adapts comes before one that has more blocks.

    foreign: name -> (rows, columns) of its ΔW, the columns being its fan-in; None if not known.
    """

    def fits(family: Family, name: str, shape: tuple[int, int] | None) -> bool:
        modules = family.find(name)
        if shape is None or not modules or not modules[0].shape:
            return bool(modules)
        rows, columns = sum(m.shape[0] for m in modules), {math.prod(m.shape[1:]) for m in modules}
        return rows == shape[0] and columns == {shape[1]}

    fitting = [f for f in FAMILIES.values() if foreign and all(fits(f, *item) for item in foreign.items())]
    if len(fitting) < 2:
        return tuple(fitting)
    return tuple(sorted(fitting, key=lambda family: _likelihood(family, foreign), reverse=True))


def as_likely(family: Family, other: Family, foreign: Collection[str]) -> bool:
    """Whether nothing in foreign names, but that it is older, speaks for one family rather than the other."""
    return _likelihood(family, foreign) == _likelihood(other, foreign)


def _likelihood(family: Family, foreign: Collection[str]) -> tuple[int, bool]:
    """How many of the names the family spells so, and whether they are of all its blocks."""
    return sum(map(family.own, foreign)), family.whole(foreign)
