"""What is in an adapter file, whether it is well, and how two differ. No base and no model is needed."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from peftkit.adapters import registry
from peftkit.delta.distance import norm, ratio, relative
from peftkit.errors import PeftkitError
from peftkit.files.bind import bind, described, misfit, needs_base, placeholder_weight
from peftkit.files.entries import canonical_items, delta_of
from peftkit.files.extras import listed
from peftkit.files.families import names as families
from peftkit.files.formats.patch import Patch
from peftkit.files.loads import ProgramLoad, by_outcome, loads
from peftkit.files.read import Reading, read, read_all
from peftkit.kernels.blocks import all_finite
from peftkit.wrapping.listing import Row, listing

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Inspected:
    """One module.

    norm: ‖ΔW‖ at strength 1, None where that depends on the base or was not asked for. problem: "" for a sound one.
    """

    name: str
    kind: str
    shape: str
    rank: int | None
    scale: str
    norm: float | None
    parameters: int
    problem: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class Inspection:
    """All that a file says.

    loads: program -> "" if it reads the file as it is, else the reason it does not. programs: program -> what it loads
    and skips, why, and at which scale.
    """

    path: Path
    format: str
    name: str
    family: str
    modules: tuple[Inspected, ...]
    vectors: tuple[str, ...]
    metadata: dict[str, str]
    loads: dict[str, str]
    notes: tuple[str, ...]
    damage: tuple[str, ...] = ()  # what is wrong with the changes of biases and norms, and with the extras
    extras: tuple[str, ...] = ()  # parameters that trained beside the adapters
    renamed: Mapping[str, str] = field(default_factory=dict)  # name in the file -> name here, where that is another
    programs: Mapping[str, ProgramLoad] = field(default_factory=dict)
    without: str = "depends on the base"  # why no module has a norm, where none has

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the file unusable in whole or in part."""
        return (*(f"{m.name}: {m.problem}" for m in self.modules if m.problem), *self.damage)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(m.kind for m in self.modules).items())
        ranks = sorted({m.rank for m in self.modules if m.rank is not None})
        total = sum(m.parameters for m in self.modules)
        reads = "loads in, so renamed" if self.renamed else "loads in"
        norms = [m.norm for m in self.modules if m.norm is not None]  # of a broken module there is none
        lines = [
            f"{self.path}: {self.format} file{f' for {self.family}' if self.family else ''}, {kinds or 'no matrices'}",
            f"ranks {', '.join(map(str, ranks)) or 'none'}; {total:,} numbers; "
            + (f"‖ΔW‖ = {math.sqrt(sum(n * n for n in norms)):.4g} at strength 1" if norms else f"‖ΔW‖ {self.without}"),
            f"{reads}: {', '.join(name for name, why in self.loads.items() if not why) or 'peftkit only'}",
        ]
        if self.vectors:
            lines.append(f"{len(self.vectors)} changes of biases and norms")
        lines += [f"{listed(self.extras)} that trained beside the adapters"] if self.extras else []
        lines += [f"problem: {problem}" for problem in self.problems[:8]]
        return "\n".join([*lines, *self.notes, *by_outcome(self.programs)])

    def table(self, *, every: bool = True) -> Table:
        """Every module, for rich to print; every=False: one row for modules that are alike."""
        rows = [
            Row(
                f"{m.name}: {m.problem}" if m.problem else m.name,
                (m.kind, str(m.rank or ""), m.dtype, m.shape, m.scale),
                (m.norm,),
            )
            for m in self.modules
        ]
        return listing(["kind", "rank", "dtype", "weight", "scale"], {"‖ΔW‖": "{:.4g}".format}, rows, every=every)


def inspect(path: str | os.PathLike[str], *, norms: bool = True, **reading: Unpack[Reading]) -> Inspection:
    """Say what is in an adapter file: kinds, ranks, scales and their origin, ‖ΔW‖, dead or broken modules.

    No base and no model is needed.

    Args:
        path: the file, or a folder of PEFT.
        norms: whether to read all numbers, for ‖ΔW‖ and for modules that are dead or broken. Without them, the header
            and the scales are read: of a file of 1 GB in a tenth of the time.
        **reading: as in `read`.

    Returns:
        All that the file says, and what every program would load and skip of it as it is, why, and at which scale.

    Raises:
        FileError: a file that is no adapter file, or is damaged as a whole.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> found = pk.inspect(path)
        >>> found.modules[0].kind, found.modules[0].norm
        ('full', 4.0)
    """
    bundle = read(path, **reading)
    modules: list[Inspected] = []
    shapes: dict[str, tuple[int, int] | None] = {}
    kinds: dict[str, Patch] = {}
    counted: set[str] = set()
    for name in bundle.patches:
        patch = bundle.patches[name]
        modules.append(_inspected(name, patch, bundle.portable, counted, norms=norms))
        counted |= {*patch.common.values()}
        sizes = (patch.shape.rows, patch.shape.columns)
        shapes[name] = sizes if all(sizes) else None
        kinds[name] = replace(patch, tensors={})
    family = next(iter(families.guess(shapes)), None)
    received = loads(bundle, kinds, family)
    notes = [f"{key}: no adapter in the header has it" for key in bundle.unclaimed]
    title = "" if family is None else family.title
    beside = itertools.chain(bundle.vectors.items(), bundle.extras.items())
    damage = [f"{key} is not finite" for key, v in beside if norms and not all_finite(v)]
    return Inspection(
        Path(path),
        bundle.format,
        bundle.name,
        title,
        tuple(modules),
        tuple(bundle.vectors),
        dict(bundle.metadata),
        {program: load.why for program, load in received.items()},
        tuple(notes),
        tuple(damage),
        tuple(bundle.extras),
        bundle.renamed,
        received,
        "depends on the base" if norms else "was not asked for",
    )


@dataclass(frozen=True)
class Diagnosis:
    """Whether a file can be used. code: 0 it can, 1 in part (dead modules, stray tensors), 2 it cannot.

    programs: of a file of another program, what each program loads and skips, why, and at which scale.
    """

    code: int
    findings: tuple[str, ...]
    programs: Mapping[str, ProgramLoad] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = ("sound", "usable in part", "not usable")[self.code]
        return "\n".join([verdict, *self.findings, *(by_outcome(self.programs) if self.programs else ())])


def doctor(path: str | os.PathLike[str], **reading: Unpack[Reading]) -> Diagnosis:
    """Say whether an adapter file can be used, with a code for scripts. Nothing in a file makes it raise.

    Args:
        path: the file, or a folder of PEFT.
        **reading: as in `read`.

    Returns:
        The code and what was found.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> print(pk.doctor(path))
        sound
    """
    try:
        found = inspect(path, **reading)
    except PeftkitError as error:
        return Diagnosis(2, (str(error),))
    broken = [f"{m.name}: {m.problem}" for m in found.modules if m.problem and m.problem != _DEAD]
    broken += found.damage
    dead = [m.name for m in found.modules if m.problem == _DEAD]
    silent = [f"{len(dead)} of {len(found.modules)} modules do nothing: {dead[0]}, …"] if dead else []
    findings = [*broken, *silent, *found.notes]
    unusable = broken or (dead and len(dead) == len(found.modules) and not found.vectors and not found.extras)
    programs = {} if found.format == "native" else found.programs
    return Diagnosis(2 if unusable else 1 if findings else 0, tuple(findings), programs)


@dataclass(frozen=True)
class Difference:
    """How two files differ.

    distances: module -> ‖ΔW₂ − ΔW₁‖/‖ΔW₁‖, for the modules both have; and extra -> ‖E₂ − E₁‖/‖E₁‖.
    """

    distances: dict[str, float]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def equal(self) -> bool:
        """Whether they are the same change of the same weights, to the rounding of fp32."""
        return not any(self.only) and all(d < 1e-6 for d in self.distances.values())

    def table(self) -> Table:
        """Every module that both have, for rich to print."""
        rows = [Row(name, (), (distance,)) for name, distance in self.distances.items()]
        return listing([], {"‖ΔW₂ − ΔW₁‖/‖ΔW₁‖": "{:.3g}".format}, rows, every=True)

    def __str__(self) -> str:
        worst = max(self.distances, key=lambda name: self.distances[name], default=None)
        same = sum(d < 1e-6 for d in self.distances.values())
        lines = [f"{len(self.distances)} modules in both, {same} of them equal"]
        if worst is not None and self.distances[worst] >= 1e-6:
            lines.append(f"most different: {worst} by {100 * self.distances[worst]:.3g} %")
        lines += [
            f"{len(own)} only in the {which}: {own[0]}, …"
            for own, which in zip(self.only, ("first", "second"), strict=True)
            if own
        ]
        return "\n".join(lines)


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> Difference:
    """Measure how far the ΔW of two adapter files are apart, whatever their formats and kinds.

    Args:
        first: an adapter file, or a folder of PEFT.
        second: another one.
        base: for adapters that read theirs.
        other_base: accept a base that a file was not trained on.
        **reading: as in `read`.

    Returns:
        The relative distance of every module that both files have, and the modules that one of them has alone.

    Raises:
        ExportError: a ΔW that depends on a base that is not given.
        FileError: a file that is no adapter file.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> _ = pk.rescale(path, 1.5, "stronger.safetensors")
        >>> pk.diff(path, "stronger.safetensors").distances
        {'0': 0.5}
    """
    files = list(zip((first, second), read_all([first, second], **reading), strict=True))
    ours, theirs = canonical_items(files, base, other_base)
    distances: dict[str, float] = {}
    for name in ours.keys() & theirs.keys():
        one, other = delta_of(ours[name]), delta_of(theirs[name])
        distances[name] = relative(one, other) if one.shape == other.shape else math.inf
    ordered = {name: distances[name] for name in ours if name in distances}
    beside = _extras_apart(*(bundle.extras for _, bundle in files))
    first_only = (*(n for n in ours if n not in theirs), *beside.only[0])
    second_only = (*(n for n in theirs if n not in ours), *beside.only[1])
    return Difference(ordered | beside.distances, (first_only, second_only))


# -- parts ----------------------------------------------------------------------------------------------------------


def _extras_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Difference:
    """How far the extras of two files are apart, relative to the first's."""
    distances: dict[str, float] = {}
    for name in (name for name in ours if name in theirs):
        one, other = ours[name].double(), theirs[name].double()
        gap = float((other - one).norm()) if one.shape == other.shape else math.inf
        distances[name] = ratio(gap, float(one.norm()))
    return Difference(distances, (tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours)))


_DEAD = "ΔW is zero: it does nothing"


@torch.no_grad()
def _inspected(name: str, patch: Patch, portable: bool, counted: Collection[str], *, norms: bool) -> Inspected:
    """What is in one patch. counted: the tensors that it may share with patches before it, which count there."""
    parameters = sum(tensor.numel() for key, tensor in patch.tensors.items() if patch.common.get(key) not in counted)
    dtype = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in patch.tensors.values()}))

    def said(norm: float | None, problem: str = "") -> Inspected:
        return Inspected(name, patch.kind, described(patch), patch.rank, patch.scale, norm, parameters, problem, dtype)

    broken = [key for key, tensor in patch.tensors.items() if norms and not all_finite(tensor)]
    if broken:
        return said(None, f"{broken[0]} is not finite")
    try:
        # What a file does not say of its weight's size, its tensors do not depend on
        rows, columns = patch.least or registry.get(patch.kind).least(patch.options)
        shape = replace(patch.shape, rows=patch.shape.rows or rows, channels=patch.shape.channels or columns)
        found = misfit(patch, shape, torch.float32, portable=portable, where=name, numbers=norms)
        if found:
            return said(None, found.first)
        if not norms or shape != patch.shape or needs_base(patch, shape, portable):
            return said(None)
        W = placeholder_weight(shape)
        size = norm(bind(patch, shape, W, name)(W, 1.0))
    except PeftkitError as error:
        return said(None, str(error))
    if not math.isfinite(size):
        return said(None, "ΔW is not finite")
    return said(size, "" if size else _DEAD)
