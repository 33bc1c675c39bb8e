"""The adapters of a model or of a file one by one, each on its base where that is at hand."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftkit.adapted import one_name, placed
from peftkit.adapter import Adapter
from peftkit.bases import Base, of_model, open_base
from peftkit.binding import bind, is_of_its_base, misfit, needs_base, require_same_base, stand_in
from peftkit.delta import Delta
from peftkit.errors import ExportError, MismatchError, about
from peftkit.formats import names, native
from peftkit.formats.names import Family
from peftkit.formats.patch import Bundle, Patch
from peftkit.geometry import Shape
from peftkit.placing import resolver_of, samples_of, shape_of, whole
from peftkit.reading import Reading, read
from peftkit.resolving import families_of, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, eq=False)
class Item:
    """One adapter to write, by the name it has in its file or model.

    base: W (m, n), None where it is not at hand. path: of its module in the base, where that is known. transposed: a
    transposed convolution. sliced: rows of a parameter, which is no module of its own. file: where it is from.
    """

    name: str
    adapter: Adapter
    shape: Shape
    base: Tensor | None
    path: str = ""
    transposed: bool = False
    sliced: bool = False
    file: str = ""


def items_of_model(model: nn.Module, name: str | None) -> Iterator[Item]:
    for at in placed(model, [one_name(model, name)]):
        geometry = at.slot.geometry
        yield Item(
            at.site,
            copy.deepcopy(at.adapter).eval(),
            geometry.shape,
            at.base,
            at.site,
            geometry.transposed,
            at.slot.parameter != "weight",
        )


def items_of_file(
    path: str | os.PathLike[str],
    base: nn.Module | str | os.PathLike[str] | None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> Iterator[Item]:
    """The adapters of a file. With a base, under its modules' names where these are whole modules."""
    bundle = read(path, **reading)
    with about(path):
        yield from _items(path, bundle, base, other_base)


def _items(
    path: str | os.PathLike[str], bundle: Bundle, base: nn.Module | str | os.PathLike[str] | None, other_base: bool
) -> Iterator[Item]:
    if bundle.vectors:
        raise ExportError(
            f"{path} changes biases or norms ({next(iter(bundle.vectors))}, …), which export does not carry"
        )
    if base is not None:
        opened = of_model(base) if isinstance(base, nn.Module) else open_base(base)
        yield from _on_base(path, bundle, opened, other_base)
        return
    families = families_of(bundle)
    for name, patch in bundle.patches.items():
        where = f"{path}: {name}"
        if not patch.shape.rows or not patch.shape.columns:
            raise ExportError(f"{where}: the file does not say how large its weight is; give the base")
        found = misfit(patch, patch.shape, torch.float32, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        adapter = bind(patch, patch.shape, stand_in(patch.shape), where)
        if adapter.derived() and not bundle.portable:
            raise ExportError(
                f"{where}: {patch.kind} is made of its base's factors, which are not in the file; give the base"
            )
        shape = _unflattened(name, patch, families)
        yield Item(name, adapter, shape, None, transposed=patch.transposed, file=str(path))


def _unflattened(name: str, patch: Patch, families: Sequence[Family]) -> Shape:
    """The shape of a patch's weight, with the kernel its family's module has where the file holds it flattened."""
    shape = patch.shape
    matches = families[0].find(name) if families else ()
    if patch.kernel_known or len(matches) != 1:
        return shape
    _, *inputs = matches[0].shape
    fits = inputs and math.prod(inputs) == shape.columns
    return Shape(shape.rows, inputs[0], tuple(inputs[1:])) if fits else shape


def _on_base(file: object, bundle: Bundle, base: Base, other_base: bool) -> Iterator[Item]:
    resolver, families = resolver_of(base)
    distances: dict[str, float] = {}
    bound: list[str] = []
    items: list[Item] = []
    for name, patch in bundle.patches.items():
        where = f"{file}: {name}"
        parts = resolver(name, families or families_of(bundle))
        if not parts:
            raise MismatchError(f"{where}: the base has no such weight.{resolver.hint(name)}")
        shape, W = shape_of(base, parts, patch), whole(base, parts, patch)
        found = misfit(patch, shape, W.dtype, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        first, *others = parts
        path = "" if others or first.start is not None else first.weight.removesuffix(".weight")
        if name in bundle.base and not others and needs_base(patch, shape, bundle.portable):
            distances[name] = native.distance(samples_of(base, first, patch), bundle.base[name])
            bound += [name] if is_of_its_base(patch, shape) and not bundle.portable else []
        items.append(Item(name, bind(patch, shape, W, where), shape, W, path, patch.transposed, file=str(file)))
    kinds = {item.name: item.adapter.kind for item in items}
    require_same_base(file, str(base.path), distances, kinds, bound, other_base)
    yield from items


def delta_of(item: Item) -> Delta:
    """ΔW of an adapter of a file, on its base where it reads one."""
    with torch.no_grad():
        if item.adapter.reads_base and item.base is None:
            raise ExportError(
                f"{item.file}: {item.name}: the ΔW of {item.adapter.kind} depends on the base: give base="
            )
        return item.adapter(stand_in(item.shape) if item.base is None else item.base, 1.0)


def canonical(items: Sequence[Item]) -> dict[str, Item]:
    """Items under names that do not depend on who wrote the file."""
    shapes = {item.name: (item.shape.rows, item.shape.columns) for item in items}
    family = next(iter(names.guess(shapes)), None)
    found: dict[str, Item] = {}
    for item in items:
        modules = () if family is None else family.find(item.name)
        name = modules[0].name if len(modules) == 1 else plain(item.name)
        if name in found:
            raise MismatchError(f"{item.file}: {item.name} and {found[name].name} are the same module")
        found[name] = item
    return found
