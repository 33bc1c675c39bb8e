"""What a merge will do, found out before anything is written: every tensor of every file has a place, or it raises."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from peftkit.adapters import registry
from peftkit.delta.distance import relative
from peftkit.errors import MismatchError, OptionError, error_context, require_choice, require_option
from peftkit.files.base import Base, open_base
from peftkit.files.bind import bind, is_of_its_base, misfit, shown
from peftkit.files.extras import key_in, listed
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import require_same_base
from peftkit.files.formats import container, native
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.merge_steps import Planned, PlannedExtra, PlannedVector, conflicts
from peftkit.files.patterns import Strength, Strengths
from peftkit.files.place import (
    FLOATS,
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
from peftkit.files.read import Reading, distinct, read_all
from peftkit.files.rename import renamed_as
from peftkit.files.resolve import families_of
from peftkit.files.trees import at_home
from peftkit.geometry import Shape
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.wrapping.listing import Row, listing

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: file -> its strength
Adapters = Mapping[str, Strength] | Mapping[Path, Strength] | Mapping[str | Path, Strength]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What a merge will do. str(plan) is a summary, table() every weight."""

    base: Base
    patches: tuple[Planned, ...]
    vectors: tuple[PlannedVector, ...]
    bundles: Mapping[str, AdapterFile]
    origin: Base | None = None
    dtype: torch.dtype | None = None
    extras: tuple[PlannedExtra, ...] = ()

    @property
    def touched(self) -> tuple[str, ...]:
        """The base's tensors that will change, in the base's order."""
        keys = {part.weight for p in self.patches for part in p.parts} | {extra.key for extra in self.extras}
        keys |= {span.key for v in self.vectors for span in v.spans}
        return tuple(key for key in self.base.where if key in keys)

    @property
    def memory(self) -> int:
        """Bytes the merge may need beside the interpreter: three times the largest tensor it changes, and 100 MB."""
        return 3 * max((self.base.info(key).size for key in self.touched), default=0) + 100_000_000

    def __str__(self) -> str:
        total, touched = len(self.base.where), self.touched
        lines = [
            f"{self.base.path}: {total} tensors, {self.base.size / 1e9:.2f} GB; {len(touched)} of them change, "
            f"in at most {self.memory / 1e6:.0f} MB of memory"
        ]
        for file in self.bundles:
            own = [p for p in self.patches if p.file == file]
            beside = [e for e in self.extras if e.file == file]
            others = {v.strength for v in self.vectors if v.file == file} | {e.strength for e in beside}
            strengths = sorted({p.strength for p in own} | others)
            shown = ", ".join(f"{s:g}" for s in strengths[:4]) + (", …" if len(strengths) > 4 else "")
            laws = "".join(f"; {law}" for law in sorted({p.law for p in own} - {"additive"}))
            apart = max((p.difference for p in own if p.difference is not None), default=None)
            differ = "" if apart is None else f" (reapplied and transplanted differ by up to {100 * apart:.3g} %)"
            trained = f" and {listed([e.name for e in beside])}" if beside else ""
            called = renamed_as(self.bundles[file])
            lines.append(f"{file}: {len(own)} weights{trained} at strength {shown}{laws}{differ}{called}")
        return "\n".join(lines)

    def table(self, *, every: bool = True) -> Table:
        """Every patch, for rich to print; every=False: one row for patches that are alike."""
        rows = [
            Row(f"{p.name} in {p.weight}", (Path(p.file).name, p.kind, str(p.shape), f"{p.strength:g}", p.law))
            for p in self.patches
        ]
        return listing(["file", "kind", "weight", "strength", "law"], {}, rows, every=every)


def plan_merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    *,
    dtype: torch.dtype | None = None,
    rebase: str = "reapply",
    origin: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> MergePlan:
    """Find a place in the base for every tensor of every adapter file, and check that all of it can be merged.

    Headers and adapters are read, not the base's data.

    Args:
        base: the checkpoint, as in `merge_checkpoint`.
        adapters: the files and their strengths, as in `merge_checkpoint`.
        dtype: of the result's floating point tensors, by default that of the base's.
        rebase: "reapply" or "transplant", as in `merge_checkpoint`.
        origin: the base that the adapters were trained on.
        other_base: accept a base that a file was not trained on.
        **reading: as in `read`.

    Returns:
        What `merge_checkpoint` would do, weight by weight.

    Raises:
        MismatchError: a tensor of an adapter file without a place in the base, or that does not fit there.
        WrongBaseError: a base that a file was not trained on.
        UnsupportedLayerError: a weight that ΔW cannot be added to, such as a quantised one.
        OptionError: strengths that match nothing, or options without a meaning.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> from safetensors.torch import save_file
        >>> save_file(nn.Sequential(nn.Linear(8, 8)).state_dict(), "base.safetensors")
        >>> plan = pk.plan_merge("base.safetensors", {path: {"0": 0.5}}, other_base=True)
        >>> plan.touched, plan.patches[0].strength
        (('0.weight',), 0.5)
    """
    require_choice("rebase", rebase, ("reapply", "transplant"))
    require_option(dtype is None or container.NAMES.get(dtype) in FLOATS, "dtype", dtype, "a floating point dtype")
    if not adapters:
        raise OptionError("adapters is empty: give at least one file and its strength")
    pickles = reading.get("allow_pickle", False)
    opened = open_base(base, allow_pickle=pickles)
    own = None if origin is None else open_base(origin, allow_pickle=pickles)
    files = distinct(adapters)
    read = zip(files, read_all(files, **reading), strict=True)
    bundles = {path: at_home(bundle, opened.where, path) for path, bundle in read}
    planner = _Planner(opened, own, rebase, other_base)
    with error_context(base, *adapters):
        for path, strength in adapters.items():
            planner.add(str(path), bundles[str(path)], strength)
        planner.find_conflicts()
        planner.raise_problems()
    extras = tuple(planner.extras)
    return MergePlan(opened, tuple(planner.patches), tuple(planner.vectors), bundles, own, dtype, extras)


# -- parts ----------------------------------------------------------------------------------------------------------


class _Planner:
    """Collects the places of patches, and all that is wrong before anything is said."""

    def __init__(self, base: Base, origin: Base | None, rebase: str, other_base: bool) -> None:
        self.base, self.origin, self.rebase, self.other_base = base, origin, rebase, other_base
        self.resolver, self.families = resolver_of(base)
        self.patches: list[Planned] = []
        self.vectors: list[PlannedVector] = []
        self.extras: list[PlannedExtra] = []
        self.unresolved: list[str] = []
        self.misfits: list[str] = []
        self.bound: set[str] = set()  # patches whose file needs the very base they were trained on

    def add(self, file: str, bundle: AdapterFile, strength: Strength) -> None:
        self.unresolved += [f"{file}: {key}: no adapter in the header has it" for key in bundle.unclaimed]
        found = ((name, oriented(self.resolver(name, self.families), p)) for name, p in bundle.patches.items())
        targets = {name: parts for name, parts in found if parts or not bundle.patches[name].same_as}
        if not self.families and (lost := [name for name, parts in targets.items() if not parts]):
            families = families_of(bundle, lost)
            targets |= {name: oriented(self.resolver(name, families), bundle.patches[name]) for name in lost}
        with error_context(file):
            strengths = Strengths(strength)
        distances: dict[str, float] = {}
        self._find_overlaps(file, targets)
        for name, parts in targets.items():
            if not parts:
                hint = nowhere(self.resolver, name, bundle, bundle.patches[name])
                self.unresolved.append(f"{file}: {name}.{hint}")
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
            self.unresolved.append(f"{file}: there is no adapter in it")
        self._check_base(file, bundle, distances)

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
            require_addable(self.base, part.weight, where)
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
            require_addable(self.base, str(target), where)
        places = spans(self.base, parts, bias=what == "bias")
        size = sum(place.size for place in places)
        if size != vector.numel() or any(len(self.base.info(str(target)).shape) != 1 for target in targets):
            self.misfits.append(f"{where}: {vector.numel()} entries in the file, {size} in the base")
        elif not torch.isfinite(vector.float()).all():
            self.misfits.append(f"{where}: it is not finite")
        factor = _required(strengths, (module, key, *map(str, targets)), file)
        if factor:
            self.vectors.append(PlannedVector(file, key, places, factor))

    def _extra(self, file: str, name: str, bundle: AdapterFile, strengths: Strengths) -> None:
        key, value, where = key_in(self.base, name), bundle.extras[name], f"{file}: {name}"
        if key is None:
            self.unresolved.append(f"{where}: the base has no such tensor")
            return
        require_addable(self.base, key, where)
        shape = self.base.info(key).shape
        if shape != tuple(value.shape) or not value.is_floating_point():
            self.misfits.append(f"{where}: {shown(value)} in the file, {shape} in the base")
        elif not torch.isfinite(value.float()).all():
            self.misfits.append(f"{where}: it is not finite")
        factor = _required(strengths, (name, name.rpartition(".")[0], key), file)
        if factor:
            self.extras.append(PlannedExtra(file, name, key, factor))

    def find_conflicts(self) -> None:
        self.misfits += conflicts(self.patches, self.vectors, self.extras)

    def _check_base(self, file: str, bundle: AdapterFile, distances: Mapping[str, float]) -> None:
        patches = {name: bundle.patches[name] for name in distances}
        kinds, near = {n: p.kind for n, p in patches.items()}, [n for n, p in patches.items() if p.quantised]
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
            raise MismatchError(f"{self.base.path}: nothing was merged\n" + "\n".join(said))


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
