"""Where everything in adapter files goes in a base, and all that is wrong with it, found before anything is said."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

import torch

from peftkit.adapters import registry
from peftkit.delta.distance import relative
from peftkit.errors import MismatchError, OptionError, error_context
from peftkit.files.base import Base
from peftkit.files.bind import bind, is_of_its_base, misfit, shown
from peftkit.files.component import of_component
from peftkit.files.extras import key_in
from peftkit.files.families.family import Family
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import require_same_base
from peftkit.files.formats import container, native
from peftkit.files.formats.patch import AdapterFile, OnDemand, Patch
from peftkit.files.merge_steps import Planned, PlannedExtra, PlannedVector, conflicts
from peftkit.files.patterns import Strength, Strengths
from peftkit.files.place import (
    nowhere,
    oriented,
    require_addable,
    require_same_keys,
    resolver_of,
    samples_of,
    shape_of,
    spans,
    whole,
)
from peftkit.files.quantised import refuse_quantised
from peftkit.files.resolve import common, component_of, families_of, names_of
from peftkit.files.stored import Stored
from peftkit.geometry import Shape
from peftkit.kernels.blocks import accumulation_dtype, all_finite


class Planner:
    """Collects the places of patches, and all that is wrong before anything is said."""

    def __init__(
        self,
        base: Base,
        origin: Base | None,
        rebase: str,
        other_base: bool,
        component: str | None,
        quantised: Mapping[str, Stored],
        dequantises: bool,
    ) -> None:
        self.base, self.origin, self.rebase, self.other_base = base, origin, rebase, other_base
        self.component, self.quantised, self.refused = component, quantised, {} if dequantises else quantised
        self.resolver, self.families = resolver_of(base, component)
        self.patches: list[Planned] = []
        self.vectors: list[PlannedVector] = []
        self.extras: list[PlannedExtra] = []
        self.unresolved: list[str] = []
        self.misfits: list[str] = []
        self.strangers: list[str] = []  # files of which no module is in the base
        self.bound: set[str] = set()  # patches whose file needs the very base they were trained on

    def add(self, file: str, bundle: AdapterFile, strength: Strength) -> None:
        """Find the places of one file. bundle: what is left of it where a component was asked for."""
        self.unresolved += [f"{file}: {key}: no adapter in the header has it" for key in bundle.unclaimed]
        found = ((name, oriented(self.resolver(name, self.families), p)) for name, p in bundle.patches.items())
        targets = {name: parts for name, parts in found if parts or not bundle.patches[name].same_as}
        if not self.families and (lost := [name for name, parts in targets.items() if not parts]):
            families = families_of(bundle, lost)
            targets |= {name: oriented(self.resolver(name, families), bundle.patches[name]) for name in lost}
        with error_context(file):
            strengths = Strengths(strength)
        self.strangers += [file] if len(targets) > 1 and not any(targets.values()) else []
        distances: dict[str, float] = {}
        self._find_overlaps(file, targets)
        families = () if all(targets.values()) else self.families or families_of(bundle)
        theirs = {common(families, n) or component_of(n, "") for n, parts in targets.items() if parts} - {""}
        for name, parts in targets.items():
            if not parts:
                self.unresolved.append(f"{file}: {name}.{self._hint(name, bundle, families, theirs)}")
                continue
            factor = _required(strengths, (name, *(part.weight for part in parts)), file)
            if factor:
                self._patch(file, name, bundle, parts, factor, distances)
        for key in bundle.vectors:
            self._vector(file, key, bundle, strengths)
        for name in bundle.extras:
            self._extra(file, name, bundle, strengths)
        if strengths.unmatched:
            raise OptionError(f"{file}: the strength pattern {strengths.unmatched[0]!r} matches none of its weights")
        if not targets and not bundle.vectors and not bundle.extras:
            whose = "" if self.component is None else f" for {self.component}"
            self.unresolved.append(f"{file}: there is no adapter{whose} in it")
        self._check_base(file, bundle, distances)

    def _hint(self, name: str, bundle: AdapterFile, families: Sequence[Family], theirs: Set[str]) -> str:
        """What may help where a name has no place in the base. theirs: the components that other names are of."""
        own = common(families, name) or component_of(name, "")
        if self.base.pipeline or not own or len(theirs) != 1 or own in theirs:
            return nowhere(self.resolver, name, bundle, bundle.patches[name])
        return f" It is of the {own}: component={next(iter(theirs))!r} leaves it alone"

    def _require_addable(self, key: str, where: str) -> None:
        refuse_quantised(self.base, key, where, self.refused)
        require_addable(self.base, key, where)

    def _find_overlaps(self, file: str, targets: Mapping[str, Sequence[Placement]]) -> None:
        """Two patches of one file may not be of the same rows."""
        taken: defaultdict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for name, part in ((name, part) for name, parts in targets.items() for part in parts):
            start, stop = part.start or 0, math.inf if part.stop is None else part.stop
            for other in (n for a, b, n in taken[part.weight] if a < stop and start < b):
                self.misfits.append(f"{file}: {other} and {name} are both of {part.weight}")
            taken[part.weight].append((start, stop, name))

    def _patch(
        self,
        file: str,
        name: str,
        bundle: AdapterFile,
        parts: tuple[Placement, ...],
        strength: float,
        distances: dict[str, float],
    ) -> None:
        patch, where = bundle.patches[name], f"{file}: {name}"
        for part in parts:
            self._require_addable(part.weight, where)
        try:
            shape = shape_of(self.base, parts, patch)
        except MismatchError as error:
            self.misfits.append(f"{where}: {error}")
            return
        dtype = container.DTYPES[self.base.info(parts[0].weight).dtype]
        wide = accumulation_dtype(dtype) if dtype.itemsize < 2 else dtype
        found = misfit(patch, shape, wide, portable=bundle.portable, where=where)
        if found:
            self.misfits.append(found.first if where in found.first else f"{where}: {found.first}")
            return
        if patch.bias and any(part.bias in self.base.where for part in parts):
            self.misfits.append(f"{where}: the base has a bias there, and {patch.bias}")
            return
        if self.origin is not None:
            require_same_keys(self.base, self.origin, parts)
        if name in bundle.base and len(parts) == 1:
            trained_on = self.base if self.origin is None else self.origin
            distances[name] = native.distance(samples_of(trained_on, parts[0], patch), bundle.base[name])
        bound = not bundle.portable and is_of_its_base(patch, shape)
        self.bound |= {name} if bound else set()
        law, difference = self._law(patch, bound, where), None
        if registry.get(patch.kind).needs_base(patch.options) and not bound and self.origin is not None:
            difference = _difference(patch, parts, shape, self.base, self.origin, where)
        self.patches.append(Planned(file, name, patch.kind, parts, shape, strength, law, difference))

    def _law(self, patch: Patch, bound: bool, where: str) -> str:
        """What a patch does on this base. bound: its ΔW is made of factors of the base it was trained on."""
        if bound:
            return "additive" if self.origin is None else "transplant"
        if not registry.get(patch.kind).needs_base(patch.options):
            return "additive"
        if self.rebase == "transplant" and self.origin is None:
            raise OptionError(
                f"{where}: to transplant what {patch.kind} does, give origin=, the base it was trained on"
            )
        return self.rebase

    def _vector(self, file: str, key: str, bundle: AdapterFile, strengths: Strengths) -> None:
        module, _, what = key.rpartition(".")
        parts, vector, where = self.resolver(module, self.families), bundle.vectors[key], f"{file}: {key}"
        targets = [part.bias if what == "bias" else part.weight for part in parts]
        if not parts or any(target not in self.base.where for target in targets):
            hint = self.resolver.hint(module, bundle.name_in_file(module))
            self.unresolved.append(f"{where}: the base has no such {what}.{hint}")
            return
        for target in targets:
            self._require_addable(str(target), where)
        places = spans(self.base, parts, bias=what == "bias")
        size = sum(place.size for place in places)
        if size != vector.numel() or any(len(self.base.info(str(target)).shape) != 1 for target in targets):
            self.misfits.append(f"{where}: {vector.numel()} entries in the file, {size} in the base")
        elif not all_finite(vector):
            self.misfits.append(f"{where}: it is not finite")
        factor = _required(strengths, (module, key, *map(str, targets)), file)
        if factor:
            self.vectors.append(PlannedVector(file, key, places, factor))

    def _extra(self, file: str, name: str, bundle: AdapterFile, strengths: Strengths) -> None:
        value, where = bundle.extras[name], f"{file}: {name}"
        key = name if self.component is None else f"{self.component}.{name}"
        key = key if key in self.base.where else key_in(self.base, name)
        if key is None:
            module, own_name = (n.rpartition(".")[0] for n in (name, bundle.name_in_file(name)))
            hint = self.resolver.tied(module, own_name) or self.resolver.hint(module, own_name)
            self.unresolved.append(f"{where}: the base has no such tensor.{hint}")
            return
        self._require_addable(key, where)
        shape = self.base.info(key).shape
        if shape != tuple(value.shape) or not value.is_floating_point():
            self.misfits.append(f"{where}: {shown(value)} in the file, {shape} in the base")
        elif not all_finite(value):
            self.misfits.append(f"{where}: it is not finite")
        factor = _required(strengths, (name, name.rpartition(".")[0], key), file)
        if factor:
            self.extras.append(PlannedExtra(file, name, key, factor))

    def find_conflicts(self) -> None:
        self.misfits += conflicts(self.patches, self.vectors, self.extras)

    def _check_base(self, file: str, bundle: AdapterFile, distances: Mapping[str, float]) -> None:
        patches = {name: bundle.patches[name] for name in distances}
        quantised = {p.name for p in self.patches for part in p.parts if part.weight in self.quantised}
        near = [n for n, p in patches.items() if p.quantised or n in quantised]
        kinds = {n: p.kind for n, p in patches.items()}
        origin = self.origin or self.base
        require_same_base(file, str(origin.path), distances, kinds, self.bound, self.other_base, near)

    def raise_problems(self) -> None:
        problems = [("without a place in the base", self.unresolved), ("that do not fit", self.misfits)]
        said = [
            f"{len(lines)} {what}:\n"
            + "\n".join(f"  {line}" for line in lines[:8])
            + ("\n  …" if len(lines) > 8 else "")
            for what, lines in problems
            if lines
        ]
        if said:
            of_none = ", ".join(self.strangers)
            other = f"; it has no module of {of_none}: a file for another kind of model?" if of_none else ""
            raise MismatchError(f"{self.base.path}: nothing was merged{other}\n" + "\n".join(said))


def _required(strengths: Strengths, names: Sequence[str], file: str) -> float:
    found = strengths.of(*names, default=math.nan)
    if math.isnan(found):  # a strength that was given is finite
        idle = f", and {strengths.unmatched[0]!r} has matched nothing" if strengths.unmatched else ""
        raise OptionError(f"{file}: no strength pattern matches {names[0]}{idle}; add '*' for the rest")
    return found


@torch.no_grad()
def _difference(patch: Patch, parts: Sequence[Placement], shape: Shape, base: Base, origin: Base, where: str) -> float:
    """How far what the adapter does to this base is from what it did to its own, relative to the latter."""
    transplanted, reapplied = (
        bind(patch, shape, W, where)(W, 1.0) for W in (whole(b, parts, patch) for b in (origin, base))
    )
    return relative(transplanted, reapplied)


def of_part(bundle: AdapterFile, component: str | None, base: Base, path: Path) -> AdapterFile:
    """Return what a file has for one part of a pipeline, all of it where no part is asked for."""
    if component is None:
        return bundle
    if bundle.format == "native":
        return of_component(bundle, component, base.where)
    vectors = {key: key.rpartition(".")[0] for key in bundle.vectors}
    own = names_of(component, {*bundle.patches, *vectors.values(), *bundle.extras}, families_of(bundle))
    return replace(
        bundle,
        patches=OnDemand(path, [name for name in bundle.patches if name in own], bundle.patches.__getitem__),
        vectors={key: bundle.vectors[key] for key, module in vectors.items() if module in own},
        extras=OnDemand(path, [name for name in bundle.extras if name in own], bundle.extras.__getitem__),
    )
