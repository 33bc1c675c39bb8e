"""Merge adapters into a checkpoint, file to file: planned first, streamed tensor by tensor, all or nothing.

Nothing is written before every tensor of every adapter file has a place in the base. Then tensors that no adapter
touches are copied undecoded, the others are merged one at a time by the very function that merges in memory.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from peftkit import registry
from peftkit._version import __version__
from peftkit.adding import MergedWeight, add_, refuse_inert
from peftkit.bases import Base, open_base
from peftkit.binding import bind, misfit, sample_index
from peftkit.delta import Delta, Dense
from peftkit.delta.base import accumulation_dtype, row_blocks
from peftkit.errors import FileError, MergeError, MismatchError, OptionError, UnsupportedLayerError, WrongBaseError
from peftkit.formats import container, names, native
from peftkit.formats.container import Info
from peftkit.formats.patch import Bundle, Patch
from peftkit.geometry import Geometry, Shape
from peftkit.merge import MergeReport
from peftkit.reading import read
from peftkit.resolving import Part, Resolver, families_of
from peftkit.wrap import require_strength

#: strength of a file: one number, or by patterns over its weights, of which the first that matches counts
Strength = float | Mapping[str, float]
#: called with bytes written and bytes in all
Progress = Callable[[int, int], None]

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: header entries that a change of the tensors makes untrue
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class Planned:
    """One patch and its place in the base. law: "additive" (the same ΔW on any base), "reapply" or "transplant".

    difference: ‖ΔW reapplied − ΔW transplanted‖/‖ΔW transplanted‖ where both bases are at hand; None elsewhere.
    """

    file: str
    name: str
    kind: str
    parts: tuple[Part, ...]
    shape: Shape
    strength: float
    law: str
    difference: float | None = None

    @property
    def weight(self) -> str:
        """Where it goes, in one line."""
        return ", ".join(p.weight + ("" if p.start is None else f"[{p.start}:{p.stop}]") for p in self.parts)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What a merge will do. str(plan) is a summary, table() every weight."""

    base: Base
    patches: tuple[Planned, ...]
    vectors: tuple[tuple[str, str, str, float], ...]  # file, its key, the base's key, strength
    bundles: Mapping[str, Bundle]
    origin: Base | None = None
    dtype: torch.dtype | None = None

    @property
    def touched(self) -> tuple[str, ...]:
        """The base's tensors that will change, in the base's order."""
        keys = {part.weight for p in self.patches for part in p.parts} | {key for _, _, key, _ in self.vectors}
        return tuple(key for key in self.base.where if key in keys)

    @property
    def memory(self) -> int:
        """Bytes the merge needs beside the interpreter, at most: three times the largest tensor it changes."""
        return 3 * max((self.base.info(key).size for key in self.touched), default=0)

    def __str__(self) -> str:
        total, touched = len(self.base.where), self.touched
        lines = [
            f"{self.base.path}: {total} tensors, {self.base.size / 1e9:.2f} GB; {len(touched)} of them change, "
            f"at most {self.memory / 1e6:.0f} MB at a time"
        ]
        for file in self.bundles:
            own = [p for p in self.patches if p.file == file]
            strengths = sorted({p.strength for p in own} | {s for f, _, _, s in self.vectors if f == file})
            shown = ", ".join(f"{s:g}" for s in strengths[:4]) + (", …" if len(strengths) > 4 else "")
            laws = "".join(f"; {law}" for law in sorted({p.law for p in own} - {"additive"}))
            apart = max((p.difference for p in own if p.difference is not None), default=None)
            differ = "" if apart is None else f" (reapplied and transplanted differ by up to {100 * apart:.3g} %)"
            lines.append(f"{file}: {len(own)} weights at strength {shown}{laws}{differ}")
        return "\n".join(lines)

    def table(self) -> Table:
        """Every patch, for rich to print."""
        table = Table("file", "module", "kind", "tensor", "strength", "law")
        for p in self.patches:
            table.add_row(Path(p.file).name, p.name, p.kind, p.weight, f"{p.strength:g}", p.law)
        return table


def plan_merge(
    base: str | os.PathLike[str],
    adapters: Mapping[str | os.PathLike[str], Strength],
    *,
    dtype: torch.dtype | None = None,
    rebase: str = "reapply",
    origin: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    ignore: str | Sequence[str] = (),
    dora_axis: str | None = None,
    alpha_zero: str | None = None,
    allow_pickle: bool = False,
) -> MergePlan:
    """Find a place in the base for every tensor of every adapter file, and check that all of it can be done.

    Reads headers and adapters, not the base's data. See `merge_checkpoint` for the arguments and what raises.
    """
    if rebase not in ("reapply", "transplant"):
        raise OptionError(f"rebase={rebase!r} was given, 'reapply' or 'transplant' was expected")
    if dtype is not None and container.NAMES.get(dtype) not in _FLOATS:
        raise OptionError(f"dtype={dtype!r} was given, a floating point dtype was expected")
    if not adapters:
        raise OptionError("adapters is empty: give at least one file and its strength")
    opened = open_base(base, allow_pickle=allow_pickle)
    own = None if origin is None else open_base(origin, allow_pickle=allow_pickle)
    bundles: dict[str, Bundle] = {}
    for path in adapters:
        if str(path) in bundles:
            raise OptionError(f"{path} is among the adapters twice: give it once, with the sum of its strengths")
        bundles[str(path)] = read(
            path, ignore=ignore, dora_axis=dora_axis, alpha_zero=alpha_zero, allow_pickle=allow_pickle
        )
    planner = _Planner(opened, own, rebase, other_base)
    for path, strength in adapters.items():
        planner.add(str(path), bundles[str(path)], strength)
    planner.raise_problems()
    return MergePlan(opened, tuple(planner.patches), tuple(planner.vectors), bundles, own, dtype)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Mapping[str | os.PathLike[str], Strength],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rebase: str = "reapply",
    origin: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    ignore: str | Sequence[str] = (),
    dora_axis: str | None = None,
    alpha_zero: str | None = None,
    allow_pickle: bool = False,
) -> MergeReport:
    """Write base + Σ strength·ΔW to `out`, a file for a file and a folder for shards or a pipeline.

    adapters: {file: strength}, or {file: {pattern: strength}} over its modules' and the base's tensors' names, of which
    the first pattern that matches counts. dtype: of the result's floating point tensors; by default each keeps its own.
    rebase: what adapters that read their base do on this one: "reapply" what they learnt to it, or "transplant" the ΔW
    they have on `origin`, the base they were trained on. other_base: accept a base that is not that one, where a file
    says which it was. verify: read everything back before it takes its name. progress: called with bytes written and
    bytes in all. The rest as in `read`.

    All or nothing: raises MismatchError for anything without a place, WrongBaseError, UnsupportedLayerError for a
    weight that cannot be added to, MergeError for a ΔW that is not finite or lost whole to rounding; `out` is then what
    it was before. The same weights come out, bit for bit, as from merging in memory.
    """
    plan = plan_merge(
        base,
        adapters,
        dtype=dtype,
        rebase=rebase,
        origin=origin,
        other_base=other_base,
        ignore=ignore,
        dora_axis=dora_axis,
        alpha_zero=alpha_zero,
        allow_pickle=allow_pickle,
    )
    out = Path(out)
    writer = _Writer(plan, progress or (lambda done, total: None))
    if not plan.base.folder:
        if out.suffix != ".safetensors":
            raise FileError(f"{out}: a merged file is called *.safetensors, {out.suffix or 'no suffix'!r} was given")
        (shard,) = plan.base.shards
        with container.atomic(out) as file:
            writer.shard(shard, file)
            refuse_inert(writer.weights)
            file.flush()
            if verify:
                writer.verify(shard, Path(file.name))
        return MergeReport(tuple(writer.weights))
    with container.atomic_folder(out) as folder:
        for shard in plan.base.shards:
            target = folder / Path(shard).with_suffix(".safetensors")
            target.parent.mkdir(exist_ok=True)
            with target.open("xb") as file:
                writer.shard(shard, file)
            if verify:
                writer.verify(shard, target)
        refuse_inert(writer.weights)
        _copy_rest(plan.base, folder)
    return MergeReport(tuple(writer.weights))


# -- planning ----------------------------------------------------------------------------------------------------------


class _Planner:
    """Collects the places of patches, and all that is wrong before anything is said."""

    def __init__(self, base: Base, origin: Base | None, rebase: str, other_base: bool) -> None:
        self.base, self.origin, self.rebase, self.other_base = base, origin, rebase, other_base
        self.resolver, self.families = _resolver(base)
        self.patches: list[Planned] = []
        self.vectors: list[tuple[str, str, str, float]] = []
        self.unresolved: list[str] = []
        self.misfits: list[str] = []

    def add(self, file: str, bundle: Bundle, strength: Strength) -> None:
        self.unresolved += [f"{file}: {key}: no adapter in the header has it" for key in bundle.unclaimed]
        targets = {name: self.resolver(name, self.families) for name in bundle.patches}
        lost = [name for name, parts in targets.items() if not parts]
        if lost and not self.families:
            families = families_of(bundle, lost)
            targets |= {name: self.resolver(name, families) for name in lost}
        used: set[str] = set()
        distances: dict[str, float] = {}
        for name, parts in targets.items():
            if not parts:
                self.unresolved.append(f"{file}: {name}.{self.resolver.hint(name)}")
                continue
            factor = _strength(strength, (name, *(part.weight for part in parts)), file, used)
            if factor:
                self._patch(file, name, bundle, parts, factor, distances)
        for key in bundle.vectors:
            self._vector(file, key, bundle, strength, used)
        if isinstance(strength, Mapping) and set(strength) - used:
            raise OptionError(
                f"{file}: the strength pattern {sorted(set(strength) - used)[0]!r} matches none of its weights"
            )
        if not targets and not bundle.vectors:
            self.unresolved.append(f"{file}: there is no adapter in it")
        self._check_base(file, bundle, distances)

    def _patch(
        self,
        file: str,
        name: str,
        bundle: Bundle,
        parts: tuple[Part, ...],
        strength: float,
        distances: dict[str, float],
    ) -> None:
        patch, where = bundle.patches[name], f"{file}: {name}"
        for part in parts:
            _require_addable(self.base, part.weight, where)
        shape = _shape(self.base, parts, patch)
        dtype = container.DTYPES[self.base.info(parts[0].weight).dtype]
        wide = accumulation_dtype(dtype) if dtype.itemsize < 2 else dtype
        found = misfit(patch, shape, wide, portable=bundle.portable, where=where)
        if found:
            self.misfits.append(found.first if where in found.first else f"{where}: {found.first}")
            return
        if patch.bias and any(part.bias in self.base.where for part in parts):
            self.misfits.append(f"{where}: the base has a bias there, and {patch.bias}")
            return
        if name in bundle.base and len(parts) == 1:
            distances[name] = native.distance(_samples(self.base, parts[0], patch), bundle.base[name])
        law, difference = "additive", None
        if registry.get(patch.kind).reads_base:
            law = self.rebase
            if law == "transplant" and self.origin is None:
                raise OptionError(
                    f"{where}: to transplant what {patch.kind} does, give origin=, the base it was trained on"
                )
            if self.origin is not None:
                difference = _difference(patch, parts, shape, self.base, self.origin, where)
        self.patches.append(Planned(file, name, patch.kind, parts, shape, strength, law, difference))

    def _vector(self, file: str, key: str, bundle: Bundle, strength: Strength, used: set[str]) -> None:
        module, _, what = key.rpartition(".")
        parts = self.resolver(module, self.families)
        where = f"{file}: {key}"
        target = None
        if len(parts) == 1 and parts[0].start is None:
            target = parts[0].bias if what == "bias" else parts[0].weight
        if target is None or target not in self.base.where:
            self.unresolved.append(f"{where}: the base has no such {what}.{self.resolver.hint(module)}")
            return
        _require_addable(self.base, target, where)
        if self.base.info(target).shape != tuple(bundle.vectors[key].shape):
            shapes = f"{tuple(bundle.vectors[key].shape)} in the file, {self.base.info(target).shape} in the base"
            self.misfits.append(f"{where}: {shapes}")
        elif not torch.isfinite(bundle.vectors[key].float()).all():
            self.misfits.append(f"{where}: it is not finite")
        factor = _strength(strength, (module, key, target), file, used)
        if factor:
            self.vectors.append((file, key, target, factor))

    def _check_base(self, file: str, bundle: Bundle, distances: Mapping[str, float]) -> None:
        far = {name: d for name, d in distances.items() if d > native.SAME_BASE}
        if not far or self.origin is not None:
            return
        kinds = {bundle.patches[name].kind for name in far}
        bound = {kind for kind in kinds if "loldu" in kind and not bundle.portable}
        if self.other_base and not bound:
            return
        worst = max(far, key=lambda name: far[name])
        meaning = "; ".join(f"{kind} {registry.get(kind).on_another_base}" for kind in sorted(bound or kinds))
        advice = "" if bound else " To merge it here on purpose, pass other_base=True."
        raise WrongBaseError(
            f"{file} was trained on another base: {len(far)} of {len(distances)} weights differ, most of all {worst} by "
            f"{100 * far[worst]:.3g} %. On another base, {meaning}.{advice}"
        )

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


def _resolver(base: Base) -> tuple[Resolver, tuple[names.Family, ...]]:
    layout = names.of_checkpoint(base.shapes)

    def place(canonical: str) -> Part | None:
        found = None if layout is None else layout.locate(canonical)
        if found is None or found.weight not in base.where:
            return None
        return Part(found.weight, found.start, found.stop, found.swapped, found.transposed, found.bias)

    return Resolver(dict(_paths(base)), place), () if layout is None else (layout.family,)


def _paths(base: Base) -> Iterator[tuple[str, Part]]:
    """Module path -> its weight, and the projections of an nn.MultiheadAttention."""
    for key in base.where:
        path, _, last = key.rpartition(".")
        if last == "weight":
            bias = f"{path}.bias"
            yield path, Part(key, bias=bias if bias in base.where else None)
        elif last == "in_proj_weight":
            rows = base.info(key).shape[0] // 3
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{path}.{name}".lstrip("."), Part(key, i * rows, (i + 1) * rows)
        elif last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield key.removesuffix("_weight"), Part(key)
    if "weight" in base.where:
        yield "", Part("weight", bias="bias" if "bias" in base.where else None)


def _require_addable(base: Base, key: str, where: str) -> None:
    """Refuse weights whose numbers are not what the layer computes with."""
    info = base.info(key)
    if info.dtype not in _FLOATS:
        raise UnsupportedLayerError(
            f"{where}: {key} of {base.path} is {info.dtype}: a quantised base has no ΔW to add to"
        )
    if info.dtype.startswith("F8"):
        path = key.removesuffix(".weight")
        scales = [f"{path}.{end}" for end in ("scale_weight", "weight_scale", "weight_scale_inv", "scale")]
        scale = next((s for s in (*scales, "scaled_fp8") if s in base.where), None)
        if scale is not None:
            raise UnsupportedLayerError(
                f"{where}: {key} of {base.path} is {info.dtype} under the scale {scale}: its numbers are not the weight; "
                "merge into the 16-bit checkpoint it was made from"
            )


def _strength(strength: Strength, called: Sequence[str], file: str, used: set[str]) -> float:
    if not isinstance(strength, Mapping):
        require_strength(strength)
        return float(strength)
    for pattern, value in strength.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in called):
            require_strength(value)
            used.add(pattern)
            return float(value)
    raise OptionError(f"{file}: no strength pattern matches {called[0]}; add '*' for the rest")


def _shape(base: Base, parts: Sequence[Part], patch: Patch) -> Shape:
    """The weight that a patch's parts make together."""
    info = base.info(parts[0].weight)
    if patch.transposed and len(info.shape) > 2:
        return Geometry.of_weight(info.shape, patch.shape.groups, transposed=True).shape
    rows = sum(_rows(base, part) for part in parts)
    if parts[0].transposed:
        return Shape(rows, info.shape[0])
    if len(info.shape) < 2:
        return Shape(rows, 1)
    return Shape(rows, info.shape[1], tuple(info.shape[2:]), patch.shape.groups)


def _rows(base: Base, part: Part) -> int:
    shape = base.info(part.weight).shape
    if part.start is not None and part.stop is not None:
        return part.stop - part.start
    return shape[1] if part.transposed else shape[0]


def _samples(base: Base, part: Part, patch: Patch) -> np.ndarray:
    """The fingerprint of a weight, read from its file entry by entry."""
    shape = _shape(base, [part], patch)
    index = sample_index(shape.rows * shape.columns)
    if patch.transposed or part.transposed:
        return _matrix(base, part, patch)[index // shape.columns, index % shape.columns].float().numpy()
    return base.elements(part.weight, (index + (part.start or 0) * shape.columns).tolist()).float().numpy()


def _matrix(base: Base, part: Part, patch: Patch) -> Tensor:
    """The rows of a weight that a part means, in the patch's order: (rows, n)."""
    weight = base.tensor(part.weight)
    if part.transposed:
        weight = weight.mT
    elif patch.transposed and weight.dim() > 2:
        return Geometry.of_weight(tuple(weight.shape), patch.shape.groups, transposed=True).matrix(weight)
    rows = weight.flatten(1)[part.start : part.stop]
    return rows.roll(len(rows) // 2, 0) if part.swapped else rows


def _whole(base: Base, parts: Sequence[Part], patch: Patch) -> Tensor:
    """W (m, n) of a patch, with fp8 decoded."""
    rows = [_matrix(base, part, patch) for part in parts]
    W = rows[0] if len(rows) == 1 else torch.cat(rows)
    return W.float() if W.itemsize < 2 else W


@torch.no_grad()
def _difference(patch: Patch, parts: Sequence[Part], shape: Shape, base: Base, origin: Base, where: str) -> float:
    """How far what the adapter does to this base is from what it did to its own, relative to the latter."""
    reapplied, transplanted = (
        bind(patch, shape, W, where)(W, 1.0)
        for W in (_whole(b, parts, patch) for b in (base, _same_keys(origin, parts)))
    )
    gap = norm = 0.0
    for block in row_blocks(*reapplied.shape, max(reapplied.row_multiple, transplanted.row_multiple)):
        ours, theirs = reapplied.rows(block).double(), transplanted.rows(block).double()
        gap, norm = gap + float((ours - theirs).square().sum()), norm + float(theirs.square().sum())
    return math.sqrt(gap / norm) if norm else 0.0


def _same_keys(origin: Base, parts: Sequence[Part]) -> Base:
    missing = [part.weight for part in parts if part.weight not in origin.where]
    if missing:
        raise MismatchError(f"origin {origin.path} has no {missing[0]}: it must have the layout of the base")
    return origin


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class _Window(Delta):
    """Rows [first, first + size) of another ΔW."""

    of: Delta
    first: int
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.of.shape[1]

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.size))

    def scaled(self, strength: float | Tensor) -> Delta:
        return replace(self, of=self.of.scaled(strength))

    @property
    def row_multiple(self) -> int:
        aligned = self.first % self.of.row_multiple == 0 and self.size % self.of.row_multiple == 0
        return self.of.row_multiple if aligned else self.size

    def rows(self, block: slice) -> Tensor:
        start, stop, unit = self.first + block.start, self.first + block.stop, self.of.row_multiple
        outer = slice(start // unit * unit, min(-(-stop // unit) * unit, self.of.shape[0]))
        return self.of.rows(outer)[start - outer.start : stop - outer.start]


@dataclass(frozen=True)
class _Claim:
    """Rows [start, start + size) of a tensor get rows [first, …) of a patch."""

    planned: Planned
    start: int
    first: int
    size: int


class _Writer:
    """Streams the shards of a plan. weights: what happened to each, as it goes."""

    def __init__(self, plan: MergePlan, progress: Progress) -> None:
        self.plan, self.progress, self.done = plan, progress, 0
        self.weights: list[MergedWeight] = []
        self.checksums: dict[str, int] = {}
        self.claims: defaultdict[str, list[_Claim]] = defaultdict(list)
        for planned in plan.patches:
            for key, claim in _claims(plan.base, planned):
                self.claims[key].append(claim)
        self.vectors: defaultdict[str, list[tuple[str, str, float]]] = defaultdict(list)
        for file, key, target, strength in plan.vectors:
            self.vectors[target].append((file, key, strength))

    def shard(self, name: str, file: BinaryIO) -> None:
        """Write one shard: its header, then its tensors in the order they had."""
        shard, prefix = self.plan.base.shards[name]
        order = sorted(shard.infos, key=lambda key: (shard.infos[key].start, shard.infos[key].stop, key))
        head = {key: self._entry(shard.infos[key]) for key in order}
        file.write(container.header(head, self._metadata(shard.metadata, [prefix + key for key in order])))
        total = self.plan.base.size
        for key in order:
            info = shard.infos[key]
            if prefix + key in self.claims or prefix + key in self.vectors or self._entry(info)[0] != info.dtype:
                data = container.raw(self._merged(prefix + key))
                self.checksums[prefix + key] = zlib.crc32(data)
                file.write(data)
            else:
                shard.copy(key, file)
            self.done += info.size
            self.progress(self.done, total)

    def verify(self, name: str, path: Path) -> None:
        """Read a shard back: every tensor as it was meant, or as it was."""
        shard, prefix = self.plan.base.shards[name]
        back = container.read(path)
        for key in back.infos:
            expected = self.checksums.get(prefix + key)
            if expected is None:
                expected = zlib.crc32(container.raw(shard.tensor(key)))
            if zlib.crc32(container.raw(back.tensor(key))) != expected:
                raise FileError(f"{path.name}: {key} was read back other than it was written: the disk is at fault")

    def _entry(self, info: Info) -> tuple[str, tuple[int, ...], int]:
        dtype = self.plan.dtype
        if dtype is None or info.dtype not in _FLOATS:
            return info.dtype, info.shape, info.size
        return container.NAMES[dtype], info.shape, info.numel * dtype.itemsize

    def _metadata(self, own: Mapping[str, str], keys: Sequence[str]) -> dict[str, str]:
        if not any(key in self.claims or key in self.vectors for key in keys):
            return dict(own)
        files = {
            Path(file).name: sorted({p.strength for p in self.plan.patches if p.file == file})
            for file in self.plan.bundles
        }
        recipe = json.dumps({"version": __version__, "adapters": files}, ensure_ascii=False)
        return {key: value for key, value in own.items() if key not in _STALE} | {"peftkit_merge": recipe}

    @torch.no_grad()
    def _merged(self, key: str) -> Tensor:
        """One tensor of the base with all that is added to it, in its new dtype."""
        weight = self.plan.base.tensor(key)
        target = self.plan.dtype if self.plan.dtype is not None and weight.is_floating_point() else weight.dtype
        if target != weight.dtype:  # sums are formed in a dtype that holds both, and rounded once to the new one
            weight = weight.to(torch.promote_types(accumulation_dtype(weight.dtype), accumulation_dtype(target)))
        if self.claims[key]:
            self._add_claims(key, weight)
        elif self.vectors[key]:
            self._add_vectors(key, weight)
        cast = weight.to(target)
        if cast is not weight and not torch.isfinite(cast.float()).all() and torch.isfinite(weight).all():
            raise MergeError(f"{key}: {weight.dtype} to {target} overflows; nothing was merged. Choose a wider dtype")
        return cast

    def _add_claims(self, key: str, weight: Tensor) -> None:
        """All patches of one tensor, region by region where they cover different rows."""
        claims = self.claims[key]
        transposed = any(part.transposed for c in claims for part in c.planned.parts if part.weight == key)
        matrix = weight.mT.contiguous() if transposed else weight
        deltas = {id(claim): self._delta(claim.planned, key, matrix) for claim in claims}
        groups = {self.plan.bundles[c.planned.file].patches[c.planned.name].transposed for c in claims}
        spatial = next(iter(groups)) and matrix.dim() > 2
        sums = np.zeros(3)
        if spatial:
            geometry = Geometry.of_weight(tuple(matrix.shape), claims[0].planned.shape.groups, transposed=True)
            sums += _squares(add_([deltas[id(c)] for c in claims], matrix, geometry))
        else:
            edges = sorted({edge for c in claims for edge in (c.start, c.start + c.size)})
            for start, stop in itertools.pairwise(edges):
                here = [c for c in claims if c.start <= start and stop <= c.start + c.size]
                if here:
                    parts = [_window(deltas[id(c)], c.first + start - c.start, stop - start) for c in here]
                    region = matrix[start:stop]
                    sums += _squares(add_(parts, region, Geometry.of_weight(tuple(region.shape))))
        if transposed:
            weight.copy_(matrix.mT)
        norm, change, missed = np.sqrt(sums)
        files = tuple(dict.fromkeys(Path(c.planned.file).name for c in claims))
        if not math.isfinite(norm):
            raise MergeError(f"{key}: the ΔW of {', '.join(files)} is not finite; nothing was merged")
        if not math.isfinite(change):
            raise MergeError(f"{key}: W + ΔW overflows {weight.dtype}, or was not finite before; nothing was merged")
        self.weights.append(MergedWeight(key, files, norm, change, missed / norm if norm else 0.0))

    def _add_vectors(self, key: str, weight: Tensor) -> None:
        total = sum(
            strength * self.plan.bundles[file].vectors[name].to(accumulation_dtype(weight.dtype))
            for file, name, strength in self.vectors[key]
        )
        assert isinstance(total, Tensor)
        sums = add_([Dense(total[:, None])], weight[:, None], Geometry.of_weight((len(total), 1)))
        files = tuple(dict.fromkeys(Path(file).name for file, _, _ in self.vectors[key]))
        if not all(map(math.isfinite, sums)):
            raise MergeError(f"{key}: its sum with {', '.join(files)} is not finite; nothing was merged")
        self.weights.append(MergedWeight(key, files, *sums))

    def _delta(self, planned: Planned, key: str, matrix: Tensor) -> Delta:
        """λ·ΔW of a patch; where it reads the base, of the weight it is on, or of the one it was on."""
        plan, where = self.plan, f"{planned.file}: {planned.name}"
        patch = plan.bundles[planned.file].patches[planned.name]
        if planned.law == "transplant" and plan.origin is not None:
            W = _whole(plan.origin, planned.parts, patch)
        elif len(planned.parts) > 1 or planned.parts[0].start is not None or planned.parts[0].swapped:
            W = _whole(plan.base, planned.parts, patch)  # of its own: rows of it are written before others are read
        elif patch.transposed and matrix.dim() > 2:
            W = Geometry.of_weight(tuple(matrix.shape), planned.shape.groups, transposed=True).matrix(matrix)
        else:
            W = matrix.flatten(1)
        if W.itemsize < 2:
            W = W.float()
        return bind(patch, planned.shape, W, where)(W, torch.tensor(planned.strength, dtype=torch.float64))


def _squares(result: tuple[float, float, float]) -> np.ndarray:
    """‖ΔW‖², ‖moved‖² and ‖lost‖², which add up over regions."""
    norm, change, lost = result
    return np.array([norm, change, lost * norm]) ** 2


def _window(delta: Delta, first: int, size: int) -> Delta:
    return delta if (first, size) == (0, delta.shape[0]) else _Window(delta, first, size)


def _claims(base: Base, planned: Planned) -> Iterator[tuple[str, _Claim]]:
    """The rows of the base's tensors that a patch's rows go to."""
    first = 0
    for part in planned.parts:
        start, size = part.start or 0, planned.shape.rows if len(planned.parts) == 1 else _rows(base, part)
        half = size // 2
        if part.swapped:
            yield part.weight, _Claim(planned, start, first + half, half)
            yield part.weight, _Claim(planned, start + half, first, half)
        else:
            yield part.weight, _Claim(planned, start, first, size)
        first += size


def _copy_rest(base: Base, folder: Path) -> None:
    """What else a model's folder holds: configurations, tokenizers, indices."""
    for path in sorted(base.path.rglob("*")):
        relative = path.relative_to(base.path)
        if not path.is_file() or path.is_symlink() or path.suffix in (".safetensors", ".bin", ".ckpt", ".pt", ".pth"):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
