"""What a merge will do, found out before anything is written: every tensor of every file has a place, or it raises."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from peftkit.errors import error_context, require_choice, require_option
from peftkit.files.base import Base, open_base
from peftkit.files.extras import listed
from peftkit.files.formats import container
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.merge_steps import Planned, PlannedExtra, PlannedVector
from peftkit.files.patterns import Strength
from peftkit.files.place import FLOATS
from peftkit.files.planner import Planner, of_part
from peftkit.files.quantised import dequantised, open_plain, require_plain_dtype
from peftkit.files.read import Reading, distinct, read_all
from peftkit.files.rename import renamed_as
from peftkit.files.stored import stored_weights
from peftkit.files.trees import at_home
from peftkit.wrapping.listing import Row, listing
from peftkit.wrapping.merge_report import without_copies

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
        """Bytes the merge may need beside the interpreter: three times the largest tensor it decodes, and 100 MB."""
        read = self.touched if self.dtype is None else self.base.where
        return 3 * max((self.base.info(key).size for key in read), default=0) + 100_000_000

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
        return "\n".join([*lines, without_copies(self.base.copies)] if self.base.copies else lines)

    def table(self, *, every: bool = True) -> Table:
        """Every patch, for rich to print; every=False: one row for patches that are alike."""
        rows = [
            Row(f"{p.name} in {p.weight}", (Path(p.file).name, p.kind, str(p.shape), f"{p.strength:g}", p.law))
            for p in self.patches
        ]
        return listing(["file", "kind", "weight", "strength", "law"], {}, rows, every=every)


def require_adapters(adapters: Adapters) -> None:
    """Raise OptionError for adapters that are no files with their strengths, or none."""
    require_option(isinstance(adapters, Mapping) and bool(adapters), "adapters", adapters, "{file: strength}")


def plan_merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    *,
    dtype: torch.dtype | None = None,
    rebase: str = "reapply",
    origin: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    component: str | None = None,
    variant: str | None = None,
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
        component: the part of a pipeline that is meant, as in `merge_checkpoint`.
        variant: of the base, as in `merge_checkpoint`.
        **reading: as in `read`.

    Returns:
        What `merge_checkpoint` would do, weight by weight.

    Raises:
        MismatchError: a tensor of an adapter file without a place in the base, or that does not fit there.
        WrongBaseError: a base that a file was not trained on.
        AmbiguousFileError: names that fit two parts of a pipeline, without `component`.
        QuantisedMergeError: a quantised weight, without `dtype`.
        UnsupportedLayerError: a weight in a quantised format that is not read.
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
    require_adapters(adapters)
    pickles = reading.get("allow_pickle", False)
    raw = open_base(base, allow_pickle=pickles, variant=variant)
    quantised = stored_weights(raw)
    plain = dequantised(raw, quantised)
    own = None if origin is None else open_plain(origin, allow_pickle=pickles)
    files = distinct(adapters)
    part = plain if component is None else plain.part(component)
    found = dict(zip(files, read_all(files, **reading), strict=True))
    found = {path: of_part(bundle, component, plain, Path(path)) for path, bundle in found.items()}
    bundles = {path: at_home(bundle, part.where, path) for path, bundle in found.items()}
    if dtype is not None:
        require_plain_dtype(raw, quantised, dtype)
    planner = Planner(plain, own, rebase, other_base, component, quantised, dequantises=dtype is not None)
    with error_context(base, *adapters):
        for path, strength in adapters.items():
            planner.add(str(path), bundles[str(path)], strength)
        planner.find_conflicts()
        planner.raise_problems()
    steps = tuple(planner.patches), tuple(planner.vectors)
    return MergePlan(raw if dtype is None else plain, *steps, bundles, own, dtype, tuple(planner.extras))
