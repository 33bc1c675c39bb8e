"""The adapters of a model or of a file one by one, each on its base where that is at hand."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.delta import Delta
from peftkit.errors import ExportError, MismatchError, error_context
from peftkit.files.base import Base, of_model
from peftkit.files.bind import (
    bind,
    is_of_its_base,
    misfit,
    needs_base,
    placeholder_weight,
    take_rows,
)
from peftkit.files.extras import under_adapters
from peftkit.files.families import names
from peftkit.files.families.family import Family
from peftkit.files.fingerprint import require_same_base
from peftkit.files.formats import native
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.place import nowhere, oriented, resolver_of, samples_of, shape_of, whole
from peftkit.files.quantised import open_plain
from peftkit.files.resolve import families_of, plain
from peftkit.files.trees import at_home
from peftkit.geometry import Shape
from peftkit.wrapping.divided import gathered_adapter, gathered_base, require_not_empty
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name
from peftkit.wrapping.roll import require_none_lost
from peftkit.wrapping.stacks import turned
from peftkit.wrapping.vectors import is_rare_norm

#: in the canonical name of what covers several modules, and of what has its rows in the original network's order
JOINED, SWAPPED = " + ", " (halves swapped)"


@dataclass(frozen=True, eq=False)
class AdapterEntry:
    """One adapter to write, by the name it has in its file or model.

    base: W (m, n), None where it is not at hand. path: of its module in the model, where that is known. transposed: of
    a layer that keeps its weight as (in, out). sliced: rows of a parameter, which is no module of its own. file: where
    it is from. embedding: of an embedding, whose weight has a row for each token. again: it is the
    adapter of an entry before it, at another place of a shared weight. turned: of a stack of experts that
    PEFT takes for the transposed matrices. vector: of a norm's weight or a bias, as a matrix of one column.
    rare_norm: of a norm of another class than LayerNorm and GroupNorm. in_checkpoint: whether its path is that of a
    checkpoint, which may begin with what the program that saved it puts before every path.
    """

    name: str
    adapter: Adapter
    shape: Shape
    base: Tensor | None
    path: str = ""
    transposed: bool = False
    sliced: bool = False
    file: str = ""
    embedding: bool = False
    again: bool = False
    turned: bool = False
    vector: bool = False
    rare_norm: bool = False
    in_checkpoint: bool = False

    @property
    def flipped(self) -> bool:
        """Whether it is of a Conv1D of GPT-2, a Linear that keeps its weight as (in, out)."""
        return self.transposed and not self.shape.kernel and self.shape.experts == 1


def items_of_model(model: nn.Module, name: str | None) -> Iterator[AdapterEntry]:
    """Yield copies of one adapter of a model, weight by weight, in evaluation mode."""
    require_not_empty(model)
    require_none_lost(model)
    seen: set[int] = set()
    for at in installed_adapters(model, [one_name(model, name)], every_place=True):
        at.require_values()
        geometry = at.slot.geometry
        adapter, base = _adapter_and_base(at)
        yield AdapterEntry(
            at.site,
            adapter,
            geometry.shape,
            base,
            at.site,
            geometry.transposed,
            at.slot.parameter != "weight" and geometry.shape.experts == 1,
            embedding=at.looks_up,
            again=id(at.adapter) in seen,
            turned=turned(geometry),
            vector=geometry.vector,
            rare_norm=is_rare_norm(at.host),
        )
        seen.add(id(at.adapter))


def _adapter_and_base(at: InstalledAdapter) -> tuple[Adapter, Tensor]:
    """A copy of an adapter, and W; of a divided model in main memory, and W only for adapters that read it."""
    whole_adapter = gathered_adapter(at.adapter)
    if whole_adapter is at.adapter:
        return copy.deepcopy(at.adapter).eval(), at.base
    base = gathered_base(at) if at.adapter.reads_base else placeholder_weight(at.slot.geometry.shape)
    return whole_adapter.cpu().eval(), base.cpu()


def _never(families: Sequence[Family]) -> bool:
    del families
    return False


def items_of_file(
    path: str | os.PathLike[str],
    bundle: AdapterFile,
    base: Base | nn.Module | str | os.PathLike[str] | None,
    other_base: bool = False,
    apart: Callable[[Sequence[Family]], bool] = _never,
) -> Iterator[AdapterEntry]:
    """The adapters of a file. With a base, under its modules' names where these are whole modules.

    apart: whether a file of these families, where it has one adapter for layers that the original network has fused, or
    their rows in its order, gives one for each module of diffusers, under its name and in its order.
    """
    if bundle.vectors:
        raise ExportError(
            f"{path} changes biases or norms ({next(iter(bundle.vectors))}, …), which go with a merge and nowhere else"
        )
    with error_context(path):
        if base is not None:
            yield from _on_base(path, bundle, opened(base), other_base, apart)
        else:
            yield from _without_base(path, bundle, apart)


def opened(base: Base | nn.Module | str | os.PathLike[str]) -> Base:
    """The base at a path or in memory, which several files can then share."""
    if isinstance(base, Base):
        return base
    return of_model(base) if isinstance(base, nn.Module) else open_plain(base)


def _without_base(
    path: object, bundle: AdapterFile, apart: Callable[[Sequence[Family]], bool]
) -> Iterator[AdapterEntry]:
    families = families_of(bundle)
    for name, patch in _patches(path, bundle, families if families and apart(families) else ()):
        where = f"{path}: {name}"
        if not patch.shape.rows or not patch.shape.columns:
            raise ExportError(f"{where}: the file does not say how large its weight is; give the base")
        found = misfit(patch, patch.shape, torch.float32, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        adapter = bind(patch, patch.shape, placeholder_weight(patch.shape), where)
        if adapter.derived() and not bundle.portable:
            raise ExportError(
                f"{where}: {patch.kind} is made of its base's factors, which are not in the file; give the base"
            )
        shape = _unflattened(name, patch, families)
        own = name if bundle.format in ("native", "peft") and name in bundle.patches else ""  # theirs are paths
        column = shape.columns == 1 < shape.rows and not shape.kernel
        vector = column and registry.get(patch.kind).vectors
        marks = {"file": str(path), "embedding": patch.embedding, "vector": vector}
        yield AdapterEntry(name, adapter, shape, None, own, patch.transposed, **marks)


def _unflattened(name: str, patch: Patch, families: Sequence[Family]) -> Shape:
    """The shape of a patch's weight, with the kernel its family's module has where the file holds it flattened."""
    shape = patch.shape
    matches = families[0].find(name) if families else ()
    if patch.kernel_known or len(matches) != 1:
        return shape
    inputs = matches[0].shape[1:]
    fits = inputs and math.prod(inputs) == shape.columns
    return Shape(shape.rows, inputs[0], inputs[1:]) if fits else shape


def _patches(file: object, bundle: AdapterFile, families: Sequence[Family]) -> Iterator[tuple[str, Patch]]:
    """The patches of a file, those of several modules or of rows in another order as one for each module."""
    for name, patch in bundle.patches.items():
        modules = families[0].find(name) if families else ()
        swaps = bool(modules) and families[0].swaps(name)
        if len(modules) < 2 and not swaps:
            yield name, patch
            continue
        total, start = sum(module.share for module in modules), 0
        for module in modules:
            size, odd = divmod(patch.shape.rows * module.share, total)
            if odd:
                raise MismatchError(f"{file}: {name} has {patch.shape.rows} rows, {total} were expected")
            rows = torch.arange(start, start + size)
            start += size
            rows = rows.roll(size // 2) if swaps and module.swapped else rows
            yield module.name, take_rows(patch, rows, f"{file}: {name}")


def _on_base(
    file: object, bundle: AdapterFile, base: Base, other_base: bool, apart: Callable[[Sequence[Family]], bool]
) -> Iterator[AdapterEntry]:
    resolver, families = resolver_of(base)
    bundle = at_home(bundle, base.where, file)
    families = families or families_of(bundle)
    trained = under_adapters(bundle)
    distances: dict[str, float] = {}
    bound: list[str] = []
    items: list[AdapterEntry] = []
    for name, patch in _patches(file, bundle, families if families and apart(families) else ()):
        where = f"{file}: {name}"
        parts = oriented(resolver(name, families), patch)
        if not parts:
            raise MismatchError(f"{where}: the base has no such weight.{nowhere(resolver, name, bundle, patch)}")
        shape, W = shape_of(base, parts, patch), whole(base, parts, patch)
        if name in trained and needs_base(patch, shape, bundle.portable):
            raise ExportError(f"{where}: it was trained on a weight that is in the file too, which is not the base's")
        found = misfit(patch, shape, W.dtype, portable=bundle.portable, where=where)
        if found:
            raise ExportError(f"{where}: {found.first}")
        first, *others = parts
        path = "" if others or first.start is not None else base.where[first.weight][1].removesuffix(".weight")
        if name in bundle.base and not others and needs_base(patch, shape, bundle.portable):
            distances[name] = native.distance(samples_of(base, first, patch), bundle.base[name])
            bound += [name] if is_of_its_base(patch, shape) and not bundle.portable else []
        adapter = bind(patch, shape, W, where)
        vector = len(base.info(first.weight).shape) == 1
        marks = {"file": str(file), "embedding": patch.embedding, "vector": vector, "in_checkpoint": base.model is None}
        items.append(AdapterEntry(name, adapter, shape, W, path, patch.transposed, **marks))
    kinds = {item.name: item.adapter.kind for item in items}
    quantised = [name for name in distances if bundle.patches[name].quantised]
    require_same_base(file, str(base.path), distances, kinds, bound, other_base, quantised)
    yield from items


def delta_of(item: AdapterEntry) -> Delta:
    """ΔW of an adapter of a file, on its base where it reads one."""
    with torch.no_grad():
        if item.adapter.reads_base and item.base is None:
            raise ExportError(
                f"{item.file}: {item.name}: the ΔW of {item.adapter.kind} depends on the base: give base="
            )
        return item.adapter(placeholder_weight(item.shape) if item.base is None else item.base, 1.0)


def _canonical(items: Sequence[AdapterEntry]) -> dict[str, AdapterEntry]:
    """Items under names that do not depend on who wrote the file: the modules that they are of."""
    shapes = {item.name: (item.shape.rows, item.shape.columns) for item in items}
    family = next(iter(names.guess(shapes)), None)
    found: dict[str, AdapterEntry] = {}
    for item in items:
        modules = () if family is None else family.find(item.name)
        swapped = family is not None and family.swaps(item.name)
        name = JOINED.join(module.name for module in modules) + (SWAPPED if swapped else "") or plain(item.name)
        if name in found:
            raise MismatchError(f"{item.file}: {item.name} and {found[name].name} are the same module")
        found[name] = item
    return found


def canonical_items(
    files: Sequence[tuple[str | os.PathLike[str], AdapterFile]],
    base: nn.Module | str | os.PathLike[str] | None,
    other_base: bool,
) -> list[dict[str, AdapterEntry]]:
    """The items of several files under the same names; apart where one has fused what another has not."""
    shared = None if base is None else opened(base)  # the same one for every file
    found = [_canonical(list(items_of_file(path, bundle, shared, other_base))) for path, bundle in files]
    if _alike(found):
        return found
    return [_canonical(list(items_of_file(path, bundle, shared, other_base, lambda _: True))) for path, bundle in files]


def _alike(files: Sequence[dict[str, AdapterEntry]]) -> bool:
    """Whether canonical items of several files can stand side by side: no layer is fused, or turned, in one alone."""
    layers: dict[str, str] = {}
    for name in (name for items in files for name in items):
        for module in name.removesuffix(SWAPPED).split(JOINED):
            if layers.setdefault(module, name) != name:
                return False
    return all(name in files[0] for items in files for name in items if JOINED in name or name.endswith(SWAPPED))
